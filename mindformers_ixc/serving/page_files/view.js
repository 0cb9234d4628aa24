/* A conversation as elements. */
const count = (value) => value.toLocaleString(language);
const seconds = (value) => value.toLocaleString(language, { maximumFractionDigits: value < 10 ? 2 : 1 });

/* a message; `actions` has edit(message), again(message) and pictures() */
function messageView(message, actions) {
  return message.role === "user" ? questionView(message, actions) : answerView(message, actions);
}

function questionView(message, actions) {
  const files = message.files.map((file) => make("li", null, thumbnail(file, actions.pictures)));
  const shown = make("article", { class: "question", "aria-label": t("you") },
    files.length ? make("ul", { class: "files" }, ...files) : null,
    message.text ? make("div", { class: "text" }, message.text) : null,
    make("div", { class: "tools" }, message.text ? copyButton(() => message.text) : null,
      iconButton("edit", t("edit"), () => actions.edit(message))));
  return { element: shown, update: () => {} };
}

function answerView(message, actions) {
  const text = make("div", { class: "text" }), tools = make("div", { class: "tools" });
  const page = message.mode === "web" ? framePanel() : null;
  const shown = make("article", { class: "answer", "aria-label": t("model_said") },
    make("div", { class: "sides" }, text, page && page.panel), tools);
  let framedAt = 0;
  const update = () => {
    const running = message.state === "running";
    shown.setAttribute("aria-busy", String(running));
    shown.classList.toggle("running", running);
    showText(text, message);
    if (page) {
      /* a page that grows is shown anew every little while */
      if (!running || performance.now() - framedAt > 1500) {
        page.update(message.text);
        framedAt = performance.now();
      }
      shown.classList.toggle("web", !page.panel.hidden);
    }
    tools.hidden = running;
    if (!running) tools.replaceChildren(...answerTools(message, actions));
  };
  if (page) page.panel.hidden = true;
  update();
  return { element: shown, update: update };
}

function showText(place, message) {
  const html = message.mode === "web" && !message.text.includes("```") ? htmlOf(message.text) : "";
  const made = document.createDocumentFragment();
  made.append(html ? codeBlock(html, "html") : markdown(message.text));
  if (message.state === "running" && !message.text) {
    made.append(make("p", { class: "wait" }, t("thinking"), make("i"), make("i"), make("i")));
  } else if (message.state === "done" && !message.text.trim()) {
    made.append(make("p", { class: "note" }, t("empty_answer")));
  }
  if (message.state === "failed") made.append(make("p", { class: "error" }, message.error));
  refill(place, [...made.childNodes], message.state === "running");
}

/* replaces what has changed, so that what is selected stays selected; code that grows is followed by who sees its end */
function refill(place, fresh, growing) {
  const before = place.querySelector(".code:last-child pre");
  const top = before && before.scrollHeight - before.scrollTop - before.clientHeight > 60 ? before.scrollTop : Infinity;
  let same = 0;
  while (same < fresh.length && place.childNodes[same] && place.childNodes[same].isEqualNode(fresh[same])) same += 1;
  for (const one of [...place.childNodes].slice(same)) one.remove();
  place.append(...fresh.slice(same));
  const after = place.querySelector(".code:last-child pre");
  if (after && growing) after.scrollTop = Math.min(top, after.scrollHeight);
}

function answerTools(message, actions) {
  return [message.text ? copyButton(() => message.text) : null,
    iconButton("again", t("again"), () => actions.again(message), { class: "icon again" }),
    make("span", { class: "usage" }, usageOf(message).join(" · "))].filter((one) => one !== null);
}

/* what an answer took */
function usageOf(message) {
  const words = [], usage = message.usage;
  if (usage) {
    const more = usage.prompt_tokens_details || {}, inside = [];
    if (more.image_tokens) inside.push(t("usage_image", { count: count(more.image_tokens) }));
    if (more.cached_tokens) inside.push(t("usage_cached", { count: count(more.cached_tokens) }));
    const inBrackets = inside.length ? ` (${inside.join(", ")})` : "";
    words.push(t("usage_prompt", { count: count(usage.prompt_tokens) }) + inBrackets);
    words.push(t("usage_answer", { count: count(usage.completion_tokens) }));
  }
  if (message.first !== null && message.first !== undefined) {
    words.push(t("usage_first", { seconds: seconds(message.first) }));
    const writing = message.seconds - message.first;
    /* the first text may be that of several tokens, so of a few there is no speed to tell */
    if (usage && usage.completion_tokens > 8 && writing > 0) {
      words.push(t("usage_speed", { speed: seconds((usage.completion_tokens - 1) / writing) }));
    }
  } else if (message.seconds) {
    words.push(t("usage_whole", { seconds: seconds(message.seconds) }));
  }
  if (message.state === "stopped") words.push(t("stopped"));
  if (message.finish === "length") words.push(t("finish_length"));
  return words;
}

/* what stands where nothing was asked yet; `choose` gets a question */
function welcomeView(mode, choose) {
  const tries = ["1", "2"].map((number) => "try_" + mode + "_" + number).filter((key) => key in STRINGS);
  const buttons = tries.map((key) =>
    make("button", { type: "button", class: "plain", click: () => choose(t(key)) }, t(key)));
  return make("div", { class: "welcome" }, make("h2", null, t("welcome")), make("p", null, t("welcome_text")),
    make("div", { class: "tries" }, ...buttons));
}
