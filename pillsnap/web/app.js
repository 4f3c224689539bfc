// The page: photos go to the server one request each, answers become cards. Text from an answer is only ever text.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const FACTS = ["kcode", "edi_codes", "name_en", "maker", "form", "imprint_front", "imprint_back", "score_front",
    "score_back", "shape", "size_mm", "colour_front", "colour_back", "rx_otc", "ingredient", "drug_class"];
  const VISIBLE = ["imprint_front", "score_front", "colour_front", "imprint_back", "score_back", "colour_back", "shape",
    "size_mm"];
  const COLUMNS = ["photo", "pill", "kcode", "name", "confidence", "left", "top", "right", "bottom", "mode", "answer",
    "reason", "shortlist", "badge", "error"];
  const SIDES = ["front", "back"];
  const AT_ONCE = 2; // requests
  const ATTEMPTS = 6; // for a photo, while the server is busy
  const BOX = "#d55e00";

  const state = { language: "ko", entries: [], version: null, auth: false, running: 0, stopped: false, free: 0, next: 1,
    slots: {}, camera: null };
  const words = () => WORDS[state.language];

  // --- elements ---

  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
    return made;
  }

  const button = (text, call, kind) => el("button", { type: "button", class: kind, on: { click: call } }, text);
  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  function tell(text) { // to a screen reader
    byId("told").textContent = "";
    setTimeout(() => { byId("told").textContent = text; }, 50);
  }

  // --- language and colours ---

  function remembered(name, fallback) {
    try { return localStorage.getItem(`pillsnap-${name}`) || fallback; } catch { return fallback; }
  }

  function remember(name, value) {
    try { localStorage.setItem(`pillsnap-${name}`, value); } catch { /* the choice holds until the page is left */ }
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    byId("theme").value = theme;
  }

  function setLanguage(language) {
    state.language = language;
    document.documentElement.lang = language;
    byId("language").value = language;
    for (const place of document.querySelectorAll("[data-t]")) place.textContent = words()[place.dataset.t];
    showVersion();
    showSides();
    showProgress();
    for (const entry of state.entries) showCard(entry);
  }

  // --- the key ---

  let asking = null; // the open dialog

  function storedKey() {
    try { return sessionStorage.getItem("pillsnap-key") || ""; } catch { return state.key || ""; }
  }

  function storeKey(key) {
    state.key = key;
    try { sessionStorage.setItem("pillsnap-key", key); } catch { /* it holds until the page is left */ }
  }

  function askKey(why) { // a promise of whether a key was given
    if (asking) return asking;
    const dialog = byId("key-dialog");
    byId("key-why").textContent = why;
    byId("key").value = "";
    state.auth = true;
    byId("key-button").hidden = false;
    asking = new Promise((done) => {
      dialog.addEventListener("close", () => {
        asking = null;
        const key = byId("key").value.trim();
        const given = dialog.returnValue === "ok" && key !== "";
        byId("key").value = "";
        if (given) storeKey(key);
        done(given);
      }, { once: true });
    });
    dialog.returnValue = "";
    dialog.showModal();
    byId("key").focus();
    return asking;
  }

  // --- the server ---

  class Refusal extends Error {
    constructor(code, told, after) {
      super(told);
      Object.assign(this, { code, told, after });
    }
  }

  function said(refusal) { // what is wrong, and what to do, in the page's language
    const [what, fix] = words().errors[refusal.code] || words().errors.no_answer;
    return { what, fix, server: refusal.told };
  }

  async function received(path, options) { // a response that is well, or a Refusal
    const key = storedKey();
    const headers = { ...(options && options.headers), ...(key ? { "X-API-Key": key } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("offline", "");
    }
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    const error = (told && told.error) || { code: "no_answer", message: `status ${response.status}` };
    throw new Refusal(error.code, error.message, Number(response.headers.get("Retry-After")) || 1);
  }

  async function request(path, options) { // JSON, or a Refusal
    const response = await received(path, options);
    return response.json().catch(() => { throw new Refusal("no_answer", "the answer is no JSON"); });
  }

  async function withKey(path, options) { // ask for the key as often as the server wants another one
    for (;;) {
      try {
        return await request(path, options);
      } catch (error) {
        const wanted = error.code === "key_missing" || error.code === "key_wrong";
        const why = error.code === "key_wrong" ? said(error).what : words().key_needed;
        if (!wanted || !(await askKey(why))) throw error;
      }
    }
  }

  async function readVersion() {
    try {
      state.version = await withKey("version");
    } catch {
      state.version = null; // each photo will say why
    }
    if (storedKey()) byId("key-button").hidden = false;
    if (state.version) {
      choice("combo").disabled = !state.version.bundle.modes.includes("combo");
      choice("two_side").disabled = !state.version.bundle.two_side;
    }
    if (choice(chosenMode()).disabled) choice("single").checked = true;
    showVersion();
    showMode();
  }

  async function readNewVersion(answer) { // after a reload or an enrolment, what the page says is that of the bundle that answers
    const bundle = state.version && state.version.bundle;
    const same = bundle && bundle.digest === answer.hashes.bundle && (bundle.gallery || "") === (answer.hashes.gallery || "");
    if (!same) await readVersion();
  }

  function showVersion() {
    const version = state.version;
    const note = byId("data-note");
    note.hidden = !version || version.bundle.data === "aihub";
    if (!note.hidden) note.textContent = `⚠ ${words().data[version.bundle.data] || words().data.other}`;
    for (const [mode, missing] of [["combo", "mode_missing"], ["two_side", "two_side_missing"]]) {
      const told = `mode_${mode}_told`;
      document.querySelector(`[data-t=${told}]`).textContent = words()[choice(mode).disabled ? missing : told];
    }
    const stores = Boolean(version && version.keeps);
    document.querySelector("[data-t=kept_told]").textContent = stores ? words().kept_stored : words().kept_told;
  }

  // --- photos ---

  const choice = (mode) => document.querySelector(`input[name=mode][value=${mode}]`);
  const chosenMode = () => document.querySelector("input[name=mode]:checked").value;
  const nameOf = (file) => file.name || "photo.png";

  function add(files, side) { // to be asked for one by one; or the sides of a pill, which wait until both are there
    const photos = [...files].filter((file) => file instanceof Blob);
    if (chosenMode() === "two_side") {
      fill(photos, side);
      return;
    }
    ask(photos.map((file) => ({ file, name: nameOf(file), mode: chosenMode() })));
  }

  function ask(entries) {
    for (const entry of entries) {
      Object.assign(entry, { id: state.next++, status: "waiting", verdicts: {}, card: el("li", { class: "card" }) });
      state.entries.push(entry);
      byId("cards").append(entry.card);
      showCard(entry);
    }
    state.stopped = false;
    showProgress();
    run();
  }

  function askAgain(entry, mode) {
    if (mode !== entry.mode) entry.verdicts = {};
    Object.assign(entry, { mode, status: "waiting", answer: null, refusal: null, views: null });
    state.stopped = false;
    showCard(entry);
    showProgress();
    run();
  }

  // --- two sides ---

  function fill(photos, side) { // a side that was named, else those that are empty, the front first
    const free = side ? [side] : SIDES.filter((name) => !state.slots[name]);
    const put = free.slice(0, photos.length);
    put.forEach((name, n) => {
      emptySlot(name);
      state.slots[name] = { file: photos[n], url: URL.createObjectURL(photos[n]) };
    });
    showSides();
    const left = photos.length - put.length;
    if (left > 0) byId("sides-note").textContent = words().sides_full(left);
    const told = put.map((name) => words().side_there(words().sides[name]));
    tell([...told, byId("sides-note").textContent].join(" "));
  }

  function emptySlot(side) {
    if (state.slots[side]) URL.revokeObjectURL(state.slots[side].url);
    state.slots[side] = null;
  }

  function slotView(side) {
    const held = state.slots[side];
    const name = words().sides[side];
    const input = el("input", { class: "hidden-input", type: "file", id: `file-${side}`,
      accept: "image/png,image/jpeg,image/bmp,image/webp", on: { change: (event) => add(event.target.files, side) } });
    const shown = held ? el("img", { src: held.url, alt: words().slot_alt(name, nameOf(held.file)),
      on: { error: (event) => event.target.replaceWith(el("p", { class: "dim" }, words().photo_broken)) } })
      : el("p", { class: "dim" }, words().slot_empty);
    const take = button(words().camera, () => openCamera(side), "small");
    const drop = held ? button(words().remove, () => {
      emptySlot(side);
      showSides();
      byId(`file-${side}`).focus();
    }, "small") : null;
    for (const [made, what] of [[take, words().camera], [drop, words().remove]]) {
      if (made) made.setAttribute("aria-label", `${name}: ${what}`);
    }
    return el("div", { class: "side", role: "group", "aria-label": name, "data-side": side },
      el("h3", {}, name), el("div", { class: "slot" }, shown),
      el("p", { class: "buttons" }, el("label", { class: held ? "button" : "button main", for: `file-${side}` },
        words().choose_side(name)), input, take, drop));
  }

  function showSides() {
    byId("sides").replaceChildren(...SIDES.map(slotView), el("p", { id: "sides-note", class: "problem" }));
    byId("ask-sides").disabled = !SIDES.every((side) => state.slots[side]);
  }

  function showMode() { // what is asked for: photos one by one, or the two sides of one pill
    const two = chosenMode() === "two_side";
    for (const place of document.querySelectorAll(".of-two")) place.hidden = !two;
    for (const place of document.querySelectorAll(".of-one")) place.hidden = two;
  }

  function askSides() {
    const [file, back] = SIDES.map((side) => state.slots[side].file);
    SIDES.forEach(emptySlot);
    showSides();
    ask([{ file, back, name: `${nameOf(file)} + ${nameOf(back)}`, mode: "two_side" }]);
    byId("file-front").focus();
  }

  function askWithBack(entry) { // the photo of a card becomes the front
    choice("two_side").checked = true;
    showMode();
    SIDES.forEach(emptySlot);
    fill([entry.file], "front");
    byId("photos").scrollIntoView({ block: "start" });
    byId("file-back").focus();
  }

  function remove(entry) {
    if (entry.abort) entry.abort.abort();
    forget(entry);
    state.entries = state.entries.filter((other) => other !== entry);
    entry.card.remove();
    showProgress();
    byId("answers-title").scrollIntoView({ block: "nearest" });
    (state.entries.length ? byId("clear") : byId("files")).focus();
  }

  function forget(entry) { // its pictures
    for (const url of entry.urls || []) URL.revokeObjectURL(url);
    entry.urls = [];
  }

  async function run() {
    while (state.running < AT_ONCE) {
      const entry = state.entries.find((other) => other.status === "waiting");
      if (!entry || state.stopped) break;
      state.running += 1;
      entry.status = "asking";
      askOne(entry).finally(() => {
        state.running -= 1;
        showProgress();
        run();
      });
    }
    showProgress();
  }

  const seconds = (n, signal) => new Promise((done, fail) => {
    const timer = setTimeout(done, 1000 * n);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      fail(new DOMException("stopped", "AbortError"));
    }, { once: true });
  });

  async function waitUntilFree(entry) { // the server has said when to ask again
    for (let left; (left = Math.ceil((state.free - Date.now()) / 1000)) > 0;) {
      entry.told = words().wait_again(left);
      showStatus(entry);
      await seconds(Math.min(1, left), entry.abort.signal);
    }
    entry.told = null;
  }

  async function patiently(entry) { // the answer, asked again while the server is busy
    for (let attempt = 1; ; attempt += 1) {
      await waitUntilFree(entry);
      showStatus(entry);
      const body = new FormData();
      for (const photo of [entry.file, entry.back]) if (photo) body.append("photo", photo, "photo");
      const asked = entry.mode === "two_side" ? "two_side=true" : `pipeline=${entry.mode}`;
      try {
        return await withKey(`predict?${asked}`, { method: "POST", body, signal: entry.abort.signal });
      } catch (error) {
        if (!["too_many_requests", "busy"].includes(error.code) || attempt === ATTEMPTS) throw error;
        state.free = Math.max(state.free, Date.now() + 1000 * error.after);
      }
    }
  }

  async function askOne(entry) {
    entry.abort = new AbortController();
    showCard(entry);
    try {
      const answer = await patiently(entry);
      await readNewVersion(answer);
      entry.calibrated = state.version && state.version.bundle[answer.two_side ? "two_side_calibrated" : "calibrated"];
      entry.answer = answer;
      entry.status = "done";
      entry.views = await pictures(entry, answer);
    } catch (error) {
      entry.status = error.name === "AbortError" ? "stopped" : "failed";
      entry.refusal = error instanceof Refusal ? error : new Refusal("no_answer", String(error));
    }
    entry.abort = null;
    if (state.entries.includes(entry)) showCard(entry);
    else forget(entry);
  }

  function stop() {
    state.stopped = true;
    for (const entry of state.entries) {
      if (entry.abort) entry.abort.abort();
      if (entry.status === "waiting") {
        entry.status = "stopped";
        showCard(entry);
      }
    }
    showProgress();
  }

  function showProgress() {
    const all = state.entries.length;
    const busy = state.entries.filter((entry) => ["waiting", "asking"].includes(entry.status)).length;
    byId("answers").hidden = all === 0;
    byId("progress").max = Math.max(1, all);
    byId("progress").value = all - busy;
    const text = all ? words().progress(all - busy, all) : "";
    if (byId("progress-told").textContent !== text) byId("progress-told").textContent = text;
    byId("stop").hidden = busy === 0;
    byId("csv").disabled = byId("json").disabled = busy === all;
    byId("feedback-file").hidden = feedbackLines().length === 0;
  }

  // --- pictures ---

  let drawing = Promise.resolve(); // one photo at a time is in memory as pixels

  function pictures(entry, answer) { // URLs of the photos with their boxes and of each pill; null where it cannot be shown
    const drawn = drawing.then(() => draw(entry, answer)).catch(() => null);
    drawing = drawn;
    return drawn;
  }

  async function asUrl(entry, canvas) {
    const blob = await new Promise((done) => { canvas.toBlob(done, "image/jpeg", 0.88); });
    const url = URL.createObjectURL(blob);
    (entry.urls = entry.urls || []).push(url);
    return { url, width: canvas.width, height: canvas.height };
  }

  function shownPhotos(entry, answer) { // each photo with its boxes: of all pills, or of one pill's side
    if (!answer.two_side) return [{ file: entry.file, boxes: answer.items.map((item) => item.box), side: null }];
    return answer.photos.map((photo, n) => ({ file: n ? entry.back : entry.file, boxes: [photo.box], side: photo.side }));
  }

  async function draw(entry, answer) {
    const photos = [];
    const zooms = answer.items.map(() => []); // of each pill, by photo
    for (const { file, boxes, side } of shownPhotos(entry, answer)) {
      const image = await createImageBitmap(file, { imageOrientation: "from-image" });
      photos.push({ ...(await asUrl(entry, boxed(image, boxes))), side, name: nameOf(file), boxes: boxes.filter(Boolean).length });
      for (const [index, box] of boxes.entries()) {
        if (box) zooms[index].push({ ...(await asUrl(entry, zoom(image, box))), side });
      }
      image.close();
    }
    return { photos, zooms };
  }

  function boxed(image, boxes) { // a photo with its boxes
    const scale = Math.min(1, 900 / Math.max(image.width, image.height));
    const canvas = el("canvas", { width: Math.max(1, Math.round(image.width * scale)),
      height: Math.max(1, Math.round(image.height * scale)) });
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const line = Math.max(2, canvas.width / 200);
    pen.lineWidth = line;
    pen.strokeStyle = pen.fillStyle = BOX;
    pen.font = `bold ${Math.round(9 * line)}px sans-serif`;
    boxes.forEach((box, index) => {
      if (!box) return;
      const [left, top, right, bottom] = box.map((v) => v * scale);
      pen.strokeRect(left, top, right - left, bottom - top);
      pen.fillText(String(index + 1), left + 2 * line, top + 9 * line);
    });
    return canvas;
  }

  function zoom(image, box) { // one pill with a margin, 360 pixels square
    const [left, top, right, bottom] = box;
    const side = 1.2 * Math.max(right - left, bottom - top);
    const canvas = el("canvas", { width: 360, height: 360 });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, 360, 360);
    pen.imageSmoothingQuality = "high";
    const x = (left + right - side) / 2;
    const y = (top + bottom - side) / 2;
    pen.drawImage(image, x, y, side, side, 0, 0, 360, 360);
    return canvas;
  }

  const references = new Map(); // URL of each reference picture, by bundle, drug and side

  function reference(bundle, kcode, side) { // a promise of a URL; of null where the picture cannot be read
    const name = `${bundle} ${kcode} ${side}`;
    if (!references.has(name)) {
      const path = `picture?${new URLSearchParams({ kcode, side })}`;
      references.set(name, received(path).then((response) => response.blob()).then(URL.createObjectURL).catch(() => {
        references.delete(name);
        return null;
      }));
    }
    return references.get(name);
  }

  function referencesView(entry, drug) {
    const sides = Object.keys(drug.pictures).filter((side) => drug.pictures[side]);
    const shown = sides.map((side) => {
      const place = el("figure", {}, el("figcaption", { class: "dim" }, words().sides[side]));
      reference(entry.answer.hashes.bundle, drug.kcode, side).then((url) => {
        const alt = words().reference(named(drug), words().sides[side]);
        place.prepend(url ? el("img", { src: url, width: 96, height: 96, alt }) : el("p", { class: "dim" }, words().picture_broken));
      });
      return place;
    });
    return sides.length ? el("div", { class: "references", role: "group", "aria-label": words().references }, shown) : null;
  }

  const picture = (view, alt) => el("img", { src: view.url, width: view.width, height: view.height, alt });

  // --- a card ---

  const named = (drug) => drug.name || `${drug.kcode} (${words().missing})`;
  const kindOf = (item) => (item.answer === "drug" && item.reason === "no_rule" ? "unjudged" : item.answer);

  function value(field, of) { // one fact as text
    const fact = field === "kcode" || field === "edi_codes" ? of[field] : of.card[field];
    return factText(field, fact);
  }

  function factText(field, fact) {
    if (fact === null || fact === undefined || fact === "" || fact.length === 0) return words().missing;
    if (field === "size_mm") return `${fact.map((v) => (v === null ? "?" : v)).join(" × ")} mm`;
    if (field === "edi_codes") return fact.join(", ");
    const line = field.startsWith("score_") && words().score_lines[fact];
    return line ? `${fact} (${line})` : String(fact);
  }

  function role(item, candidate) {
    if (item.answer === "unknown") return words().roles.none;
    if (!item.shortlist.includes(candidate.kcode)) return words().roles.other;
    return words().roles[kindOf(item)];
  }

  function differing(candidate, first) { // a sentence, and a line for each fact that differs
    const { by, fields } = candidate.differs;
    const label = (field) => words().fields[field].split(/ ?\(/)[0];
    const told = (d) => d.first !== null && d.here !== null;
    const seen = fields.filter((d) => VISIBLE.includes(d.field));
    const sizes = (first.card.size_mm || []).some((v, n) => v !== null && candidate.card.size_mm && candidate.card.size_mm[n] !== null);
    const nothing = VISIBLE.filter((f) => (f === "size_mm" && !sizes)
      || (first.card[f] === null && !fields.some((d) => d.field === f)));
    const whole = seen.filter(told).map((d) => d.field);
    const lacking = seen.filter((d) => !told(d)).map((d) => d.field);
    const about = [whole, lacking, nothing].find((list) => list.length) || [];
    const listed = fields.filter((d) => VISIBLE.includes(d.field) || d.field === "ingredient"); // the others: all facts
    const lines = listed.map((d) => el("li", { class: told(d) ? "differs" : "unsure" }, `${told(d) ? "≠" : "?"} `,
      `${label(d.field)}: ${factText(d.field, d.first)} → ${factText(d.field, d.here)}`));
    return [el("p", {}, words().differs[by](about.map(label).join(", "))), el("ul", { class: "differences" }, lines)];
  }

  const facts = (drug) => el("dl", { class: "facts" }, FACTS.map((field) => el("div", {},
    el("dt", {}, words().fields[field]), el("dd", {}, value(field, drug)))));

  function candidateView(entry, item, candidate, number) {
    const share = el("meter", { min: 0, max: 1, value: candidate.confidence, "aria-label": words().sure(percent(candidate.confidence)) });
    const head = el("div", { class: "candidate-head" }, el("span", { class: "role" }, role(item, candidate)),
      el("b", {}, named(candidate)), el("span", { class: "share" }, percent(candidate.confidence), " ", share));
    const what = number ? differing(candidate, item.top_k[0]) : [el("p", { class: "dim" }, words().first)];
    const shown = number === 0 && item.answer === "drug"; // of an unknown pill no drug's facts stand open
    const more = el("details", { open: shown }, el("summary", {}, words().facts), facts(candidate));
    return el("li", {}, head, referencesView(entry, candidate), what, more);
  }

  const sideCaption = (view) => (view.side ? el("figcaption", { class: "dim" }, words().sides[view.side]) : null);

  function advice(answer, item) { // what to do
    const told = words().what_to_do;
    return (answer.two_side && told[`${item.reason}_both`]) || told[item.reason] || words().check;
  }

  function pillView(entry, item, index) {
    const kind = kindOf(item);
    const n = index + 1;
    const sure = item.answer === "drug" ? ` · ${words().sure(percent(item.confidence))}` : "";
    let name = named(item);
    if (item.answer === "unknown") name = words().kinds.unknown;
    if (item.answer === "shortlist") name = words().one_of(item.shortlist.length);
    const listed = item.top_k.filter((c) => item.shortlist.includes(c.kcode)).map(named).join(" · ");
    const verdict = el("div", { class: `pill ${kind}` },
      el("p", { class: "kind" }, `${n}. ${words().kinds[kind]}${sure}`),
      el("h4", {}, name),
      item.answer === "shortlist" ? el("p", {}, el("b", {}, listed)) : null,
      el("p", {}, words().reasons[item.reason] || item.reason),
      el("p", { class: "advice" }, advice(entry.answer, item)));
    const close = ((entry.views && entry.views.zooms[index]) || []).map((view) => el("figure", { class: view.side ? "zoom of-side" : "zoom" },
      picture(view, words().zoom_alt(n, view.side && words().sides[view.side])), sideCaption(view)));
    const views = item.top_k.map((candidate, number) => candidateView(entry, item, candidate, number));
    const open = Math.max(2, item.shortlist.length); // candidates that nothing hides
    const more = views.length > open ? el("details", {}, el("summary", {}, words().more(views.length - open)),
      el("ol", { start: open + 1 }, views.slice(open))) : null;
    const candidates = el("div", { class: "candidates" }, el("h5", {}, words().candidates),
      el("ol", {}, views.slice(0, open)), more);
    return el("section", { class: "item", "aria-label": `${n}. ${name}` },
      el("div", { class: "top" }, close, verdict), feedbackView(entry, item, n), candidates);
  }

  function photoView(entry) {
    if (!entry.views) return el("p", { class: "dim" }, words().photo_broken);
    const figures = entry.views.photos.map((photo) => {
      let told = words().photo_none;
      if (entry.answer.items.length) told = photo.boxes ? words().photo_told : words().photo_whole;
      const side = photo.side && words().sides[photo.side];
      const alt = words().photo_alt(side ? `${side}: ${photo.name}` : photo.name, photo.boxes);
      return el("figure", { class: "photo" }, picture(photo, alt),
        el("figcaption", { class: "dim" }, side ? `${side}. ${told}` : told));
    });
    return el("div", { class: figures.length > 1 ? "photos pair" : "photos" }, figures);
  }

  function notes(entry) {
    const { answer } = entry;
    const known = entry.calibrated === null ? [] : [entry.calibrated ? words().calibrated : words().uncalibrated];
    const line = [words().modes[answer.two_side ? "two_side" : answer.mode_used], words().views[answer.view], ...known,
      `${Math.round(answer.timings.total)} ms`].join(" · ");
    const parts = [];
    if (answer.badge) {
      const why = answer.hints.map((hint) => words().hints[hint] || hint).join(", ");
      parts.push(el("p", { class: "badge" }, `${words().badge}: ${why} `,
        comboPossible() && !answer.two_side ? button(words().as_combo, () => askAgain(entry, "combo")) : null));
    }
    if (backCouldTell(answer)) parts.push(el("p", { class: "buttons" }, button(words().with_back, () => askWithBack(entry))));
    const alone = (answer.photos || []).map((photo) => el("p", { class: "dim" },
      words().side_alone(words().sides[photo.side], named(photo), percent(photo.confidence), photo.set_size)));
    return [...parts, el("p", { class: "dim notes" }, line), ...alone];
  }

  const comboPossible = () => !choice("combo").disabled;
  const backCouldTell = (answer) => answer.mode_used === "single" && !answer.two_side && !choice("two_side").disabled
    && answer.answer !== "drug";

  function answerView(entry) {
    const { items } = entry.answer;
    const beside = (...parts) => [el("div", { class: "answer" }, photoView(entry), el("div", {}, ...parts, ...notes(entry)))];
    if (items.length) return beside(...items.map((item, n) => pillView(entry, item, n)));
    const nothing = el("div", { class: "pill unknown" }, el("h4", {}, words().no_pill), el("p", {}, words().no_pill_told),
      button(words().as_single, () => askAgain(entry, "single")));
    return beside(nothing);
  }

  function refusalView(entry) {
    if (entry.status === "stopped") return [el("p", {}, words().stopped), againButton(entry)];
    const { what, fix, server } = said(entry.refusal);
    return [el("div", { class: "pill unknown", role: "alert" }, el("h4", {}, what), el("p", {}, fix),
      server ? el("p", { class: "dim" }, `${words().server_said}: `, el("span", { lang: "en" }, server)) : null),
    againButton(entry)];
  }

  const againButton = (entry) => button(words().again, () => askAgain(entry, entry.mode));

  function showCard(entry) {
    const title = `card-${entry.id}`;
    const head = el("div", { class: "card-head" }, el("h3", { id: title }, entry.name),
      el("span", { class: "chip" }, words().modes[entry.mode]), button(words().remove, () => remove(entry), "small"));
    head.lastChild.setAttribute("aria-label", `${words().remove}: ${entry.name}`);
    entry.line = el("p", { class: "dim" });
    let body = [entry.line];
    if (entry.status === "done") body = answerView(entry);
    if (entry.status === "failed" || entry.status === "stopped") body = refusalView(entry);
    const busy = entry.status === "asking";
    entry.card.replaceChildren(el("article", { "aria-labelledby": title, "aria-busy": String(busy) }, head, ...body));
    showStatus(entry);
  }

  function showStatus(entry) {
    const plain = entry.status === "asking" ? words().asking : words().waiting;
    entry.line.textContent = entry.told || plain;
  }

  // --- right or wrong ---

  function feedbackLines() {
    return state.entries.flatMap((entry) => Object.values(entry.verdicts).filter((v) => v.here).map((v) => v.line));
  }

  function feedbackLine(entry, item, n, right, should) {
    const { hashes, mode_used: mode } = entry.answer;
    return { photo: hashes.photo, size: entry.file.size, mode, pill: n, answer: item.answer, kcode: item.kcode,
      right, should, bundle: hashes.bundle || "" };
  }

  async function send(entry, item, n, right, should) {
    const line = feedbackLine(entry, item, n, right, should);
    const onServer = Boolean(state.version && state.version.feedback);
    let told = words().sent_here;
    if (onServer) {
      try {
        await withKey("feedback", { method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify(line) });
        told = words().sent;
      } catch (error) {
        const { what, fix } = said(error instanceof Refusal ? error : new Refusal("no_answer", String(error)));
        entry.verdicts[n] = { problem: `${words().not_sent}: ${what}. ${fix}` };
        showFeedback(entry, item, n);
        return;
      }
    }
    const when = new Date().toISOString().replace(/\.\d+Z$/, "+00:00");
    entry.verdicts[n] = { right, here: !onServer, line: { ...line, who: "", when } };
    tell(told);
    showFeedback(entry, item, n);
    showProgress();
  }

  function wrongForm(entry, item, n) { // which drug it should have been
    const select = el("select", {}, el("option", { value: "" }, words().should_unknown),
      item.top_k.filter((c) => item.answer !== "drug" || c.kcode !== item.kcode)
        .map((c) => el("option", { value: c.kcode }, `${named(c)} ${c.kcode}`)));
    const coded = !state.version || state.version.bundle.keys === "kcode"; // else drugs have names of any kind
    const code = el("input", { type: "text", maxlength: coded ? 8 : 255, size: 10, autocomplete: "off", spellcheck: "false" });
    const problem = el("span", { class: "problem", role: "alert" });
    const submit = (event) => {
      event.preventDefault();
      const typed = code.value.trim().normalize("NFC");
      const isCode = /^K-[0-9]{6}$/i.test(typed);
      const should = (isCode ? typed.toUpperCase() : typed) || select.value;
      if (coded && typed && !isCode) {
        problem.textContent = words().should_wrong;
        code.focus();
        return;
      }
      send(entry, item, n, false, should);
    };
    return el("form", { class: "wrong", on: { submit } }, el("label", {}, words().should, " ", select),
      el("label", {}, coded ? words().should_code : words().should_name, " ", code), el("button", { type: "submit" }, words().send), problem);
  }

  function feedbackParts(entry, item, n) {
    const verdict = entry.verdicts[n] || {};
    if (verdict.line) return [el("span", { class: "done" }, verdict.right ? words().told_right : words().told_wrong)];
    const open = () => {
      entry.verdicts[n] = { open: true };
      showFeedback(entry, item, n).querySelector("select").focus();
    };
    const sure = item.answer === "drug" ? item.kcode : "";
    const parts = [el("span", {}, words().was_it_right), button(words().right, () => send(entry, item, n, true, sure)),
      el("button", { type: "button", "aria-expanded": String(Boolean(verdict.open)), on: { click: open } }, words().wrong)];
    if (verdict.problem) parts.push(el("span", { class: "problem", role: "alert" }, verdict.problem));
    return verdict.open ? [...parts, wrongForm(entry, item, n)] : parts;
  }

  function feedbackView(entry, item, n) {
    return el("div", { class: "feedback", role: "group", "data-pill": n, "aria-label": words().was_it_right },
      feedbackParts(entry, item, n));
  }

  function showFeedback(entry, item, n) {
    const place = entry.card.querySelector(`.feedback[data-pill="${n}"]`);
    const held = place.contains(document.activeElement);
    place.replaceChildren(...feedbackParts(entry, item, n));
    if (held) {
      place.tabIndex = -1;
      place.focus();
    }
    return place;
  }

  // --- files ---

  function save(name, kind, text) {
    const url = URL.createObjectURL(new Blob([text], { type: kind }));
    const link = el("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  function rows(entry) { // of the table: one a pill, as `pillsnap predict --out` writes it
    const shared = { photo: entry.name };
    if (entry.status === "stopped") return [];
    if (!entry.answer) return entry.refusal ? [{ ...shared, error: entry.refusal.told || said(entry.refusal).what }] : [];
    const { answer } = entry;
    Object.assign(shared, { mode: answer.mode_used, answer: answer.answer, badge: answer.badge });
    const found = answer.items.map((item, index) => {
      const [left, top, right, bottom] = item.box || [];
      const sure = item.answer === "drug" ? { kcode: item.kcode, name: item.name, confidence: item.confidence } : {};
      return { ...shared, pill: index + 1, answer: item.answer, reason: item.reason,
        shortlist: item.shortlist.join("; "), ...sure,
        left, top, right, bottom };
    });
    return found.length ? found : [shared];
  }

  function cell(content) { // a spreadsheet takes a text that begins with one of these signs for a formula
    if (content === null || content === undefined) return "";
    const text = typeof content === "string" && /^[=+\-@\t\r]/.test(content) ? `'${content}` : String(content);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function saveCsv() { // with a byte order mark, or spreadsheets read Korean names as another alphabet
    const lines = state.entries.flatMap(rows).map((row) => COLUMNS.map((column) => cell(row[column])).join(","));
    save("pillsnap.csv", "text/csv", `\ufeff${[COLUMNS.join(","), ...lines].join("\r\n")}\r\n`);
  }

  function saveJson() {
    const told = state.entries.filter((entry) => entry.answer || entry.refusal).map((entry) => (
      entry.answer ? { photo: entry.name, ...entry.answer }
        : { photo: entry.name, error: entry.refusal.told || said(entry.refusal).what }));
    save("pillsnap.json", "application/json", `${JSON.stringify(told, null, 2)}\n`);
  }

  const saveFeedback = () => save("feedback.jsonl", "application/jsonl",
    feedbackLines().map((line) => `${JSON.stringify(line)}\n`).join(""));

  function clear() {
    stop();
    state.entries.forEach(forget);
    state.entries = [];
    byId("cards").replaceChildren();
    showProgress();
    byId("files").focus();
  }

  // --- camera ---

  let stream = null;

  function closeCamera() {
    for (const track of stream ? stream.getTracks() : []) track.stop();
    stream = null;
    byId("video").srcObject = null;
    if (byId("camera-dialog").open) byId("camera-dialog").close();
  }

  async function openCamera(side) { // for one side of a pill, or for whatever is asked next
    state.camera = side || null;
    const phone = matchMedia("(pointer: coarse)").matches; // its own camera program takes sharper photos
    if (phone || !navigator.mediaDevices) {
      byId("capture").click();
      return;
    }
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 },
        height: { ideal: 1920 } } });
    } catch {
      tell(words().camera_missing);
      byId("camera-button").textContent = words().camera_missing;
      byId("camera-button").disabled = true;
      return;
    }
    byId("video").srcObject = stream;
    byId("camera-dialog").showModal();
  }

  async function shoot() {
    const video = byId("video");
    if (!video.videoWidth) return;
    const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    closeCamera();
    const blob = await new Promise((done) => { canvas.toBlob(done, "image/png"); });
    const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "");
    add([new File([blob], `camera_${time}.png`, { type: "image/png" })], state.camera);
  }

  // --- start ---

  function listenForPhotos() {
    for (const id of ["files", "capture"]) {
      byId(id).addEventListener("change", (event) => {
        add(event.target.files, id === "capture" ? state.camera : null);
        event.target.value = "";
      });
    }
    const drop = byId("drop");
    const over = (on) => (event) => {
      event.preventDefault();
      drop.classList.toggle("over", on);
    };
    document.addEventListener("dragover", over(true));
    document.addEventListener("dragleave", over(false));
    document.addEventListener("drop", (event) => {
      over(false)(event);
      const slot = event.target instanceof Element && event.target.closest(".side");
      if (event.dataTransfer) add(event.dataTransfer.files, slot ? slot.dataset.side : null);
    });
    document.addEventListener("paste", (event) => {
      const files = event.clipboardData ? event.clipboardData.files : [];
      if (files.length) add(files);
    });
  }

  function listen() {
    listenForPhotos();
    document.fonts.addEventListener("loadingdone", () => { document.documentElement.dataset.hangul = "own"; });
    const clicks = { stop, csv: saveCsv, json: saveJson, clear, shoot, "feedback-file": saveFeedback,
      "ask-sides": askSides, "camera-button": () => openCamera(), "camera-close": closeCamera,
      "key-button": async () => { if (await askKey(words().key_needed)) readVersion(); } };
    for (const [id, call] of Object.entries(clicks)) byId(id).addEventListener("click", call);
    byId("camera-dialog").addEventListener("close", closeCamera);
    byId("modes").addEventListener("change", showMode);
    byId("language").addEventListener("change", (event) => {
      remember("language", event.target.value);
      setLanguage(event.target.value);
    });
    byId("theme").addEventListener("change", (event) => {
      remember("theme", event.target.value);
      setTheme(event.target.value);
    });
  }

  listen();
  setTheme(remembered("theme", "system"));
  setLanguage(remembered("language", navigator.language.startsWith("ko") ? "ko" : "en"));
  readVersion();
})();
