/* Words in the reader's language, elements made of them, and what the browser keeps of choices. */
const STRINGS = JSON.parse(document.getElementById("strings").textContent);
const LANGUAGES = { en: "English", zh: "中文" };
const OWN = "mindformers_ixc.";       /* names of this page in the browser's storage */

const byId = (id) => document.getElementById(id);

/* a storage may be forbidden, and then nothing is kept */
function kept(name, storage) {
  try { return (storage || localStorage).getItem(OWN + name); } catch { return null; }
}

function keep(name, value, storage) {
  try {
    if (value === null) (storage || localStorage).removeItem(OWN + name);
    else (storage || localStorage).setItem(OWN + name, value);
  } catch { /* as it was before */ }
}

let language = kept("language");
if (!(language in LANGUAGES)) language = (navigator.language || "").toLowerCase().startsWith("zh") ? "zh" : "en";

/* a text of the table; {name} in it becomes a value */
function t(key, values) {
  return STRINGS[key][language].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/* what stands in the page already */
function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-hint]")) one.placeholder = t(one.dataset.hint);
  for (const one of document.querySelectorAll("[data-label]")) {
    one.setAttribute("aria-label", t(one.dataset.label));
    if (one.tagName === "BUTTON") one.title = t(one.dataset.label);
  }
}

/* an element; attributes whose value is false or null are left out, functions listen to the event of their name */
function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (![false, null, undefined].includes(value)) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((one) => one !== null && one !== undefined));
  return made;
}

function icon(name) {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#i-" + name);
  drawn.setAttribute("aria-hidden", "true");
  drawn.append(use);
  return drawn;
}

/* a button that shows a drawing and says a text */
function iconButton(name, label, press, more) {
  const attributes = { type: "button", class: "icon", "aria-label": label, title: label, click: press, ...more };
  return make("button", attributes, icon(name));
}

/* a sentence for somebody who does not see the page */
function say(text) {
  byId("said").append(make("p", null, text));
}

/* a sentence above the conversation */
function notice(text, action) {
  const bar = byId("notice"), words = bar.querySelector("span");
  words.textContent = text || "";
  if (action) words.append(" ", make("button", { type: "button", class: "text", click: action }, t("connect")));
  bar.hidden = !text;
}

function download(name, content, type) {
  const address = URL.createObjectURL(new Blob([content], { type: type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/* a button that copies what `text` gives */
function copyButton(text) {
  const button = iconButton("copy", t("copy"), async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      if (!copyBySelection(text())) return notice(t("error_copy"));
    }
    button.replaceChildren(icon("done"));
    say(t("copied"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/* where the page came by http from another machine, browsers have no clipboard for it */
function copyBySelection(text) {
  const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

/* a dialog; `fill` puts what it holds into the body. Gives the value of the button that closed it */
function dialog(title, fill, wide) {
  const box = byId("dialog"), body = byId("dialog-body");
  if (box.open) box.close("");
  byId("dialog-title").textContent = title;
  body.replaceChildren();
  box.className = wide ? "wide" : "";
  box.returnValue = "";
  fill(body, box);
  box.showModal();
  const first = body.querySelector("[autofocus]");
  if (first) first.focus();
  return new Promise((done) => box.addEventListener("close", () => done(box.returnValue), { once: true }));
}
