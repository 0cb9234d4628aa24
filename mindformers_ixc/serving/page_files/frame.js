/* The web page that a model wrote, in a frame: without network, without this page's origin, and without scripts unless
   they are allowed. The frame inherits this page's policy, so a script runs there only with the page's nonce, which it
   gets when scripts are allowed; attributes such as onclick become scripts, for no nonce is on them. */
const NONCE = document.currentScript.nonce;

/* the page in an answer, or "" */
function htmlOf(text) {
  const fenced = /```(?:html)?[ \t]*\n([\s\S]*?)(?:\n```|$)/i.exec(text);
  const found = fenced ? fenced[1] : text;
  return /<(!doctype|html|head|body|main|header|section|div|style|h1|p|table|nav|article)\b/i.test(found) ? found : "";
}

/* Chromium tells its console of every handler that this page's policy forbids as soon as it is parsed, wherever that is;
   so the handlers are parsed under another name. Values with a "<" are left as they are: that is only told then. */
const RENAMED = "data-ixc-";

function parsed(html) {
  const plain = html.replace(/<[a-z](?:[^<>"']|"[^"<]*"|'[^'<]*')*>/gi, (tag) => tag.replace(
    /"[^"]*"|'[^']*'|(?<![\w-])on[a-z]+(?=\s*=)/gi, (found) => (/^["']/.test(found) ? found : RENAMED + found)));
  return new DOMParser().parseFromString(plain, "text/html");
}

/* hosts of which the page would fetch files */
function hostsOf(html) {
  const held = parsed(html), hosts = new Set();
  for (const one of held.querySelectorAll("[src], link[href]")) {
    const found = /^(?:https?:)?\/\/([^/?#]+)/i.exec((one.getAttribute("src") || one.getAttribute("href")).trim());
    if (found) hosts.add(found[1]);
  }
  return [...hosts];
}

function framed(html, scripts) {
  const held = parsed(html);
  for (const one of held.querySelectorAll("meta[http-equiv]")) one.remove();
  for (const one of held.querySelectorAll("a[href], area[href]")) {
    /* a part of the page is reached; what leads elsewhere would open a window, which the sandbox forbids */
    const target = one.getAttribute("href").trim();
    if (target.startsWith("#")) one.setAttribute("href", "about:srcdoc" + target);
    else one.setAttribute("target", "_blank");
  }
  dropOutside(held);
  const handlers = takeHandlers(held);
  if (scripts) allow(held, handlers);
  else for (const one of held.querySelectorAll("script")) one.remove();
  return "<!doctype html>" + held.documentElement.outerHTML;
}

/* takes away what would be fetched, which the policy forbids; a grey field is where a picture would be */
function dropOutside(held) {
  for (const one of held.querySelectorAll("link, base, script[src]")) one.remove();
  for (const one of held.querySelectorAll("[src], [srcset]")) {
    one.removeAttribute("srcset");
    if (!/^\s*data:/i.test(one.getAttribute("src") || "")) one.removeAttribute("src");
  }
  const style = held.createElement("style");
  style.textContent = "img:not([src]) { box-sizing: border-box; display: inline-block; min-width: 6rem; " +
    "min-height: 4rem; padding: .4rem; background: #e4e7eb; color: #5b6675; font: 13px sans-serif; overflow: hidden }";
  held.head.prepend(style);
}

/* takes attributes such as onclick off their elements; gives scripts that do the same */
function takeHandlers(held) {
  const handlers = [];
  for (const one of held.querySelectorAll("*")) {
    for (const { name: written, value } of [...one.attributes]) {
      const name = written.replace(RENAMED, "");
      if (!/^on[a-z]+$/.test(name)) continue;
      one.removeAttribute(written);
      one.setAttribute("data-handler-" + handlers.length, "");
      const where = one === held.body && name === "onload" ? "window"
        : `document.querySelector("[data-handler-${handlers.length}]")`;
      handlers.push(`${where}.addEventListener(${JSON.stringify(name.slice(2))}, function (event) {\n` +
        `if ((function (event) {${value}\n}).call(this, event) === false) event.preventDefault();});`);
    }
  }
  return handlers;
}

function allow(held, handlers) {
  for (const handler of handlers) {
    const script = held.createElement("script");
    script.textContent = handler.replace(/<\/(script)/gi, "<\\/$1");
    held.body.append(script);
  }
  for (const one of held.querySelectorAll("script")) one.setAttribute("nonce", NONCE);
}

/* a frame with its controls; `update` shows another text */
function framePanel() {
  const panel = make("section", { class: "framed", "aria-label": t("page_frame") });
  const scripts = make("input", { type: "checkbox", role: "switch", change: () => draw() });
  const outside = make("p", { class: "note", hidden: true });
  let html = "", frame = null;
  const draw = () => {
    /* flags of a sandbox hold from the next load on, so a new frame takes the old one's place */
    const next = make("iframe", { sandbox: scripts.checked ? "allow-scripts" : "", title: t("page_frame"),
      referrerpolicy: "no-referrer", srcdoc: framed(html, scripts.checked) });
    if (frame) frame.replaceWith(next);
    else panel.append(next, outside);
    frame = next;
  };
  const larger = iconButton("larger", t("larger"), () => {
    const on = panel.classList.toggle("large");
    larger.setAttribute("aria-pressed", String(on));
  }, { "aria-pressed": "false" });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel.classList.contains("large")) { event.stopPropagation(); larger.click(); }
  });
  panel.append(make("div", { class: "bar" }, make("strong", null, t("page")),
    make("label", { class: "switch", title: t("scripts_why") }, scripts, t("scripts")),
    iconButton("download", t("save_page"), () => download("page.html", html, "text/html")), larger));
  return { panel: panel, update: (text) => {
    const found = htmlOf(text);
    panel.hidden = !found;
    if (!found || found === html) return;
    html = found;
    const hosts = hostsOf(html);
    outside.hidden = hosts.length === 0;
    outside.textContent = hosts.length ? t("outside", { hosts: hosts.slice(0, 4).join(", ") }) : "";
    draw();
  } };
}
