/* What the page does. */
let models = [], mode = "base";
let conversation = null;              /* the one that is shown */
let views = new Map();                /* message: its view, of the conversation that is shown */
let files = [];                       /* of the question in the making */
let edited = null;                    /* the question that is asked anew */
const running = new Map();            /* conversation: what ends its answer */
const narrow = matchMedia("(max-width: 60rem)");

/* ---- the server */
async function connect() {
  try {
    models = await readModels();
    notice("");
  } catch (error) {
    if (error.status === 401) return askKey(false);
    notice(error.message, connect);
    return;
  }
  limitOptions(models[0]);
  byId("model").textContent = models[0].id;
  document.title = models[0].id;
  drawModes();
  drawOptions();
  if (conversation && conversation.messages.length === 0) drawConversation();
}

async function askKey(wrongKey) {
  const value = await dialog(t("key_title"), (body) => {
    const field = make("input", { id: "key", type: "password", autocomplete: "off", autofocus: true, required: true,
      "aria-describedby": "key-note" });
    body.append(make("label", { for: "key" }, t("key")), field,
      make("p", { id: "key-note", class: wrongKey ? "error" : "note" }, wrongKey ? t("key_wrong") : t("key_text")),
      make("div", { class: "buttons" }, make("button", { type: "submit", value: "use", class: "main" }, t("key_use"))));
  });
  const key = byId("key") ? byId("key").value.trim() : "";
  byId("dialog-body").replaceChildren();
  if (value !== "use" || !key) return notice(t("error_key"), () => askKey(false));
  keep("key", key, sessionStorage);
  try {
    await readModels();
  } catch (error) {
    if (error.status === 401) { keep("key", null, sessionStorage); return askKey(true); }
  }
  return connect();
}

function drawModes() {
  const found = models.filter((one) => one.mode), row = byId("modes");
  if (!found.some((one) => one.mode === mode)) mode = found.length ? found[0].mode : "base";
  row.hidden = found.length < 2;
  row.replaceChildren(row.firstElementChild, ...found.map((one) => {
    const box = make("input", { type: "radio", name: "mode", value: one.mode, change: () => {
      mode = one.mode;
      keep("mode", mode);
      if (conversation.messages.length === 0) drawConversation();
    } });
    box.checked = one.mode === mode;
    const key = "mode_" + one.mode;
    return make("label", { title: one.id }, box, make("span", null, key in STRINGS ? t(key) : one.mode));
  }));
}

/* ---- asking */
async function send() {
  const field = byId("question"), text = field.value.trim();
  if (running.has(conversation) || (!text && files.length === 0)) return;
  const bad = wrongOption();
  if (bad) { notice(bad); return openSettings(true); }
  const before = edited ? conversation.messages.slice(0, conversation.messages.indexOf(edited)) : conversation.messages;
  const message = { role: "user", text: text, files: files };
  const limit = models[0] && models[0].max_pictures, count = picturesOf([...before, message]);
  if (limit && count > limit) return notice(t("error_many", { count: count, max: limit }));
  notice("");
  conversation.messages = [...before, message];
  if (!conversation.title) conversation.title = (text || files[0].name).replace(/\s+/g, " ").slice(0, 60).trim();
  field.value = "";
  files = [];
  edited = null;
  Store.touch(conversation);
  await answer(conversation);
}

/* has the last question of a conversation answered */
async function answer(asked) {
  const ended = new AbortController();
  const message = { role: "assistant", text: "", mode: mode, state: "running", error: "", finish: "", usage: null,
    first: null, seconds: 0 };
  asked.messages.push(message);
  running.set(asked, ended);
  byId("said").replaceChildren();
  if (asked === conversation) drawConversation();
  drawList();
  focusQuestion();
  Store.save(asked);
  try {
    const got = await askServer(await requestOf(asked, mode), ended.signal, (now) => {
      Object.assign(message, now);
      updateSoon(asked, message);
    });
    Object.assign(message, got, { state: "done" });
  } catch (error) {
    const stopped = ended.signal.aborted;
    message.state = stopped ? "stopped" : "failed";
    message.error = stopped ? "" : error.message || String(error);
    if (error.status === 401) askKey(false);
  }
  running.delete(asked);
  update(asked, message, true);
  drawComposer();
  drawList();
  await Store.save(asked);
}

async function requestOf(asked, inMode) {
  const options = optionValues(), model = models.find((one) => one.mode === inMode) || models[0];
  const messages = await wireMessages(asked.messages.slice(0, -1));
  const body = { messages: messages, ...options, stream: !(options.num_beams > 1) };
  if (model) body.model = model.id;
  if (body.stream) body.stream_options = { include_usage: true };
  const size = JSON.stringify(body.messages).length, most = model && model.max_body_bytes;
  const millions = (bytes) => (bytes / 1e6).toLocaleString(language, { maximumFractionDigits: 1 });
  if (most && size > most) throw new ServerError(t("error_large", { size: millions(size), max: millions(most) }), 0);
  return body;
}

function stop() {
  const ends = running.get(conversation);
  if (ends) ends.abort();
}

let savedAt = 0;
const waiting = new Set();            /* messages that are drawn with the next picture of the screen */

function updateSoon(asked, message) {
  if (performance.now() - savedAt > 2000) {      /* a page that is closed loses little */
    savedAt = performance.now();
    Store.save(asked);
  }
  if (waiting.has(message)) return;
  waiting.add(message);
  requestAnimationFrame(() => { waiting.delete(message); update(asked, message); });
}

/* draws what is new of an answer; who reads its end goes along with it, and sees a page that is done from its top */
function update(asked, message, ends) {
  const view = asked === conversation && views.get(message);
  if (!view) return;
  const place = byId("scroll"), atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 80;
  view.update();
  if (atEnd && ends && message.mode === "web") view.element.scrollIntoView();
  else if (atEnd && (ends || message.state === "running")) place.scrollTop = place.scrollHeight;
  read(message);
}

/* says whole sentences of an answer that grows, each once */
function read(message) {
  const done = message.state === "running" ? message.text.search(/[.!?。！？\n][^.!?。！？\n]*$/) + 1 : message.text.length;
  const from = message.told || 0;
  if (done > from) say(message.text.slice(from, done));
  Object.defineProperty(message, "told", { value: Math.max(done, from), configurable: true, enumerable: false });
  if (message.state === "failed") say(message.error);
  if (message.state === "stopped") say(t("stopped"));
}

const actions = {
  pictures: () => Math.max(1, picturesOf(conversation.messages)),
  edit: (message) => {
    edited = message;
    files = [...message.files];
    byId("question").value = message.text;
    drawComposer();
    byId("question").focus();
  },
  again: (message) => {
    if (running.has(conversation)) return;
    const bad = wrongOption();
    if (bad) { notice(bad); return openSettings(true); }
    conversation.messages = conversation.messages.slice(0, conversation.messages.indexOf(message));
    return answer(conversation);
  },
};

/* ---- drawing */
function drawConversation(fresh) {
  /* what is there stays as it is: a frame that is moved loads anew */
  const before = fresh ? new Map() : views, place = byId("messages");
  views = new Map(conversation.messages.map((message) =>
    [message, before.get(message) || messageView(message, actions)]));
  const shown = new Set([...views.values()].map((view) => view.element));
  for (const one of [...place.children]) if (!shown.has(one)) one.remove();
  for (const one of shown) if (one.parentNode !== place) place.append(one);
  byId("title").textContent = conversation.title || t("untitled");
  if (views.size === 0) place.append(welcomeView(mode, (text) => {
    byId("question").value = text;
    drawComposer();
    byId("question").focus();
  }));
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  drawComposer();
}

function drawComposer() {
  const busy = running.has(conversation), field = byId("question");
  const pictures = files.length + (edited ? 0 : picturesOf(conversation.messages));
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = !field.value.trim() && files.length === 0;
  byId("editing").hidden = edited === null;
  field.style.height = "auto";
  field.style.height = Math.min(field.scrollHeight, innerHeight * 0.4) + "px";
  byId("files").replaceChildren(...files.map((file) => make("li", null, thumbnail(file, () => pictures),
    iconButton("close", t("remove", { name: file.name }), () => {
      files = files.filter((one) => one !== file);
      drawComposer();
      field.focus();
    }))));
}

function drawList() {
  if (byId("list").querySelector("input")) return;      /* somebody writes a name */
  const shown = Store.all.filter((one) => one.messages.length > 0);
  byId("list").replaceChildren(...shown.map((one) => {
    const current = one === conversation, name = one.title || t("untitled");
    const item = make("li", { class: current ? "current" : "" },
      make("button", { type: "button", class: "name", "aria-current": current ? "true" : null, click: () => show(one) },
        running.has(one) ? make("i", { class: "busy", "aria-hidden": "true" }) : null, name));
    const save = () => exportConversation(one).catch((error) => notice(error.message));
    if (current) {
      item.append(make("span", { class: "tools" }, iconButton("edit", t("rename"), () => rename(one, item)),
        iconButton("download", t("export"), save), iconButton("delete", t("delete"), () => remove(one))));
    }
    return item;
  }));
}

function rename(one, item) {
  const field = make("input", { type: "text", maxlength: "120", "aria-label": t("rename") });
  let over = false;
  const end = (takes) => {
    if (over) return;
    over = true;
    field.remove();
    if (takes && field.value.trim()) { one.title = field.value.trim(); Store.save(one); }
    byId("title").textContent = conversation.title || t("untitled");
    drawList();
  };
  field.value = one.title;
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  });
  field.addEventListener("blur", () => end(true));
  item.replaceChildren(field);
  field.select();
}

async function remove(one) {
  const value = await dialog(t("delete_title"), (body) => body.append(
    make("p", null, t("delete_text", { title: one.title })),
    make("div", { class: "buttons" }, make("button", { type: "submit", value: "", autofocus: true }, t("cancel")),
      make("button", { type: "submit", value: "delete", class: "main bad" }, t("delete")))));
  if (value !== "delete") return;
  const ends = running.get(one);
  if (ends) ends.abort();
  await Store.remove(one);
  if (one === conversation) show(Store.all[0] || Store.add());
  else drawList();
}

function show(one) {
  const before = conversation;
  if (before && before !== one && before.messages.length === 0) Store.drop(before);
  conversation = one;
  edited = null;
  drawConversation();
  drawList();
  openHistory(false);
  focusQuestion();
}

/* where it brings up no keyboard over the answer */
function focusQuestion() {
  if (!matchMedia("(pointer: coarse)").matches) byId("question").focus();
}

/* takes over what another tab has written; `found` is missing for what it has deleted */
function takeOver(id, found) {
  const known = Store.all.find((one) => one.id === id);
  if (known && running.has(known)) return;
  if (!found) {
    if (known) Store.drop(known);
    if (known === conversation) return show(Store.add());
  } else if (known) {
    Object.assign(known, found);
    if (known === conversation && !edited) drawConversation();
  } else {
    Store.all.unshift(found);
  }
  drawList();
}

function openHistory(on) {
  document.body.classList.toggle("history", on);
  byId("open-history").setAttribute("aria-expanded", String(on));
  drawBackdrop();
  if (on) byId("close-history").focus();
}

function openSettings(on) {
  byId("settings").hidden = !on;
  byId("open-settings").setAttribute("aria-expanded", String(on));
  if (!narrow.matches) keep("settings", on ? "open" : null);
  drawBackdrop();
}

function drawBackdrop() {
  const covered = !byId("settings").hidden || document.body.classList.contains("history");
  byId("backdrop").hidden = !narrow.matches || !covered;
}

/* ---- what comes from outside */
function addFiles(list) {
  const wrongOnes = [];
  for (const file of list) {
    const made = readFile(file);
    if (made) files.push(made);
    else wrongOnes.push(t("error_file", { name: file.name }));
  }
  notice(wrongOnes.join(" "));
  drawComposer();
  byId("question").focus();
}

function listenToFiles() {
  let inside = 0;
  const brings = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  const over = (on) => { inside = on ? inside : 0; byId("drop").hidden = !on; };
  addEventListener("dragenter", (event) => { if (brings(event)) { event.preventDefault(); inside += 1; over(true); } });
  addEventListener("dragleave", (event) => { if (brings(event)) { inside -= 1; if (inside <= 0) over(false); } });
  addEventListener("dragover", (event) => { if (brings(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!brings(event)) return;
    event.preventDefault();
    over(false);
    if (!byId("dialog").open) addFiles(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    const pasted = event.clipboardData ? [...event.clipboardData.files] : [];
    if (pasted.length === 0 || byId("dialog").open) return;
    event.preventDefault();
    addFiles(pasted);
  });
  byId("attach").addEventListener("click", () => byId("choose").click());
  byId("choose").addEventListener("change", () => { addFiles(byId("choose").files); byId("choose").value = ""; });
}

function listen() {
  const field = byId("question");
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("stop").addEventListener("click", stop);
  field.addEventListener("input", drawComposer);
  field.addEventListener("keydown", (event) => {
    /* Enter that ends a Chinese word is not meant; on a phone it begins a new line */
    const writes = matchMedia("(pointer: coarse)").matches && !event.ctrlKey && !event.metaKey;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || writes) return;
    event.preventDefault();
    send();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || byId("dialog").open) return;
    if (document.body.classList.contains("history")) openHistory(false);
    else if (narrow.matches && !byId("settings").hidden) openSettings(false);
    else if (running.has(conversation)) stop();
    else if (edited) cancelEdit();
  });
  byId("editing").querySelector("button").addEventListener("click", cancelEdit);
  byId("notice").querySelector("button").addEventListener("click", () => notice(""));
  byId("new").addEventListener("click", () => show(conversation.messages.length ? Store.add() : conversation));
  byId("open-history").addEventListener("click", () => openHistory(true));
  byId("close-history").addEventListener("click", () => openHistory(false));
  byId("open-settings").addEventListener("click", () => openSettings(byId("settings").hidden));
  byId("close-settings").addEventListener("click", () => openSettings(false));
  byId("close-dialog").addEventListener("click", () => byId("dialog").close(""));
  byId("backdrop").addEventListener("click", () => { openHistory(false); openSettings(false); });
  narrow.addEventListener("change", drawBackdrop);
  listenToFiles();
}

function cancelEdit() {
  edited = null;
  files = [];
  byId("question").value = "";
  drawComposer();
}

/* ---- looks and language */
function chooseLook() {
  const looks = byId("theme"), words = byId("language");
  const colour = () => {
    if (looks.value) document.documentElement.dataset.theme = looks.value;
    else delete document.documentElement.dataset.theme;
  };
  looks.value = kept("theme") || "";
  looks.addEventListener("change", () => { keep("theme", looks.value || null); colour(); });
  colour();
  words.append(...Object.entries(LANGUAGES).map(([code, name]) => make("option", { value: code, lang: code }, name)));
  words.value = language;
  words.addEventListener("change", () => {
    language = words.value;
    keep("language", language);
    translate();
    drawModes();
    drawOptions();
    drawConversation(true);
    drawList();
  });
}

async function begin() {
  mode = kept("mode") || "base";
  translate();
  chooseLook();
  drawOptions();
  listen();
  let told = false;
  Store.failed = () => { if (!told) notice(t("error_store")); told = true; };
  Store.elsewhere = takeOver;
  await Store.open();
  show(Store.add());
  openSettings(kept("settings") === "open" && !narrow.matches);
  await connect();
}

begin();
