/* A model's text as elements: headings, lists, tables, code and emphasis. Text only ever becomes text. */
const BLOCK = {
  fence: /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/, heading: /^(#{1,6})\s+(.*)$/, rule: /^\s*([-*_])(\s*\1){2,}\s*$/,
  item: /^(\s*)([-*+•]|\d{1,9}[.)])\s+(.*)$/, quote: /^\s*>\s?(.*)$/, row: /^\s*\|.*\|\s*$/,
  border: /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/,
};

function markdown(text) {
  const made = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), made);
  return made;
}

function blocks(lines, parent) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at], fence = BLOCK.fence.exec(line), heading = BLOCK.heading.exec(line);
    if (fence) {
      at = codeAt(lines, at, fence, parent);
    } else if (heading) {
      /* the page has headings of the first two levels */
      parent.append(inline(heading[2].replace(/\s+#+$/, ""), make("h" + Math.min(6, heading[1].length + 2))));
      at += 1;
    } else if (BLOCK.rule.test(line)) {
      parent.append(make("hr"));
      at += 1;
    } else if (BLOCK.item.test(line)) {
      at = listAt(lines, at, parent);
    } else if (BLOCK.quote.test(line)) {
      const inner = [];
      for (; at < lines.length && BLOCK.quote.test(lines[at]); at += 1) inner.push(BLOCK.quote.exec(lines[at])[1]);
      const quote = make("blockquote");
      blocks(inner, quote);
      parent.append(quote);
    } else if (isTable(lines, at)) {
      at = tableAt(lines, at, parent);
    } else if (!line.trim()) {
      at += 1;
    } else {
      at = paragraphAt(lines, at, parent);
    }
  }
}

const isTable = (lines, at) => BLOCK.row.test(lines[at]) && at + 1 < lines.length && BLOCK.border.test(lines[at + 1]);

function paragraphAt(lines, at, parent) {
  const words = [lines[at]];
  for (at += 1; at < lines.length && lines[at].trim() && !isTable(lines, at); at += 1) {
    if (["fence", "heading", "item", "quote", "rule"].some((kind) => BLOCK[kind].test(lines[at]))) break;
    words.push(lines[at]);
  }
  parent.append(inline(words.join("\n"), make("p")));
  return at;
}

function codeAt(lines, at, fence, parent) {
  const code = [], end = new RegExp("^\\s*" + fence[1][0] + "{" + fence[1].length + ",}\\s*$");
  for (at += 1; at < lines.length && !end.test(lines[at]); at += 1) code.push(lines[at]);
  parent.append(codeBlock(code.join("\n"), fence[2]));
  return at + 1;
}

function codeBlock(code, name) {
  const bar = make("div", { class: "bar" }, make("span", null, name || t("code")), copyButton(() => code));
  return make("div", { class: "code" }, bar, make("pre", { tabindex: "0" }, make("code", null, code)));
}

function listAt(lines, at, parent) {
  const first = BLOCK.item.exec(lines[at]), indent = first[1].length, ordered = /\d/.test(first[2]);
  const list = make(ordered ? "ol" : "ul", ordered ? { start: parseInt(first[2], 10) } : null);
  const indentOf = (line) => line.match(/^\s*/)[0].length;
  /* a line goes on with an item if it is further in; an empty one if the next is */
  const goesOn = (place) => (lines[place].trim() ? indentOf(lines[place]) > indent
    : Boolean((lines[place + 1] || "").trim()) && indentOf(lines[place + 1]) > indent);
  while (at < lines.length) {
    const item = BLOCK.item.exec(lines[at]);
    if (!item || item[1].length > indent || /\d/.test(item[2]) !== ordered || item[1].length < indent) break;
    const inner = [item[3]];
    for (at += 1; at < lines.length && goesOn(at); at += 1) {
      inner.push(lines[at].slice(Math.min(indentOf(lines[at]), indent + 2)));
    }
    while (at < lines.length && !lines[at].trim() && BLOCK.item.test(lines[at + 1] || "")) at += 1;
    const made = make("li");
    blocks(inner, made);
    /* an item of one paragraph needs no room around it */
    if (made.firstChild && made.firstChild.tagName === "P") made.firstChild.replaceWith(...made.firstChild.childNodes);
    list.append(made);
  }
  parent.append(list);
  return at;
}

function tableAt(lines, at, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/)
    .map((one) => one.trim().replace(/\\\|/g, "|"));
  const sides = cells(lines[at + 1])
    .map((one) => (!one.endsWith(":") ? "start" : one.startsWith(":") ? "center" : "end"));
  const row = (line, tag) => make("tr", null, ...cells(line).slice(0, sides.length).map((one, place) =>
    inline(one, make(tag, { class: sides[place] }))));
  const head = make("thead", null, row(lines[at], "th")), body = make("tbody");
  for (at += 2; at < lines.length && BLOCK.row.test(lines[at]); at += 1) body.append(row(lines[at], "td"));
  parent.append(make("div", { class: "table", tabindex: "0" }, make("table", null, head, body)));
  return at;
}

const INLINE = new RegExp([
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, /\*\*(\S(?:[\s\S]*?\S)?)\*\*/, /\*([^\s*](?:[^*\n]*[^\s*])?)\*/,
  /\[([^\]\n]*)\]\((https?:\/\/[^\s()<>]+)\)/, /(\n)/, /\\([\\`*_[\]#|])/,
].map((one) => one.source).join("|"), "g");

const link = (target, name) =>
  make("a", { href: target, title: target, target: "_blank", rel: "noopener noreferrer" }, name);

/* code, bold, italic, links and line breaks; a link shows where it leads */
function inline(text, parent) {
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    parent.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    const [, , code, bold, italic, name, target, line, sign] = found;
    if (code !== undefined) parent.append(make("code", null, code.trim() || code));
    else if (bold !== undefined) parent.append(inline(bold, make("strong")));
    else if (italic !== undefined) parent.append(inline(italic, make("em")));
    else if (target !== undefined) parent.append(link(target, name || target));
    else if (line) parent.append(make("br"));
    else parent.append(sign);
  }
  parent.append(text.slice(at));
  return parent;
}
