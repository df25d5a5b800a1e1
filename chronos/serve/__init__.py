"""Answering over HTTP: the wire of OpenAI's and Anthropic's clients in front of one engine.

One thread has the engine (`worker`); an event loop in front reads requests, says what is wrong with
them and writes answers as they are made. Needs the extra `serve`.
"""
