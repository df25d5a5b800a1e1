// What a page does by itself: which tab is seen, and what is live on it.
//
// Gradio calls these where an event is wired with `js` and without a Python function. A look at what
// is live goes past its machinery, which costs ten times the look here and in the browser; of what
// comes back only what changed is put in place.
window.chronos = {
  touched: false, // somebody has clicked or typed
  seen: {},
  asked: {},

  // The parts of a live tab that have changed since the last look; undefined where one has not.
  async live(tab, given) {
    if (this.asked[tab]) return [];
    this.asked[tab] = true;
    try {
      const answer = await fetch(`live/${tab}`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ given, seen: this.seen[tab] ?? [] }),
      });
      if (answer.status !== 200) return []; // 204: all is as it was
      const { seen, parts } = await answer.json();
      this.seen[tab] = seen;
      return parts.map((part) => part?.value);
    } catch {
      return []; // the UI has ended; it is asked again
    } finally {
      this.asked[tab] = false;
    }
  },

  // Go to the tab that was seen last, unless somebody has gone somewhere already.
  open(kept, tabs, live) {
    if (this.touched || !tabs.includes(kept?.tab)) return [];
    return [{ __type__: "update", selected: kept.tab }, ...this.only(kept.tab, live)];
  },

  // A tab is seen: it alone is live, and it is remembered if somebody went there. The first one is
  // also seen while a page is put together.
  look(tab, kept, live) {
    return [this.touched ? { ...kept, tab } : undefined, ...this.only(tab, live)];
  },

  only: (tab, live) => live.map((name) => ({ __type__: "update", active: name === tab })),
};
for (const kind of ["pointerdown", "keydown"]) {
  addEventListener(kind, () => { chronos.touched = true; }, { capture: true, once: true });
}
