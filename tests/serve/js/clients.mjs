// The official JavaScript clients: node clients.mjs URL MODEL. Prints one JSON object of what they saw.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "def add(left, right):" }];
const seen = {};

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
seen.models = [];
for await (const each of await openai.models.list()) seen.models.push(each.id);
const asked = { model, messages, max_tokens: 12, temperature: 0 };
const whole = await openai.chat.completions.create(asked);
seen.chat = whole.choices[0].message.content;
const stream = await openai.chat.completions.create({
  ...asked, stream: true, stream_options: { include_usage: true },
});
seen.streamed = "";
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta.content ?? "";
  seen.last = chunk.usage?.total_tokens;
}
seen.total = whole.usage.total_tokens;
const response = await openai.responses.create({
  model, input: messages[0].content, max_output_tokens: 12, temperature: 0,
});
seen.response = response.output_text;
const refused = await openai.chat.completions.create({ ...asked, model: "none" }).catch((e) => e);
seen.refused = [refused.status, refused.code];

const anthropic = new Anthropic({ baseURL: url, apiKey: "none" });
const message = anthropic.messages.stream({ model, messages, max_tokens: 12, temperature: 0 });
const final = await message.finalMessage();
seen.message = final.content[0].text;
seen.output_tokens = final.usage.output_tokens;
seen.counted = (await anthropic.messages.countTokens({ model, messages })).input_tokens;
const left = await anthropic.messages.create({ ...asked, model: "none" }).catch((e) => e);
seen.left = [left.status, left.error?.error?.type];

console.log(JSON.stringify(seen));
