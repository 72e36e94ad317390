// What a model writes as elements of the page: the little Markdown that small models write.
//
// Nothing of it is ever parsed as HTML: elements are made one by one, and text goes in as text.

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

export function button(text, action) {
  const element = make("button", "plain", text);
  element.type = "button";
  element.addEventListener("click", () => action(element));
  return element;
}

export async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    element.textContent = "Copied";
  } catch {
    element.textContent = "Not allowed"; // pages without https have no clipboard
  }
  setTimeout(() => { element.textContent = "Copy"; }, 1500);
}

const INLINE = /(`+)(?!`)([^\n]*?[^`\n])\1(?!`)|\*\*([^\n]+?)\*\*|\*([^\s*][^*\n]*?)\*|\[([^\]\n]+)\]\(([^\s()]+)\)/g;

function inline(text, parent) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, , code, bold, italic, label, target] = match;
    const element = code !== undefined ? make("code", "", code.replace(/^ (.+) $/, "$1"))
      : bold !== undefined ? inline(bold, make("strong"))
      : italic !== undefined ? inline(italic, make("em"))
      : link(label, target);
    if (!element) continue; // stays as it is written
    parent.append(text.slice(end, match.index), element);
    end = match.index + all.length;
  }
  parent.append(text.slice(end));
  return parent;
}

function link(label, target) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const element = make("a", "", label);
  element.href = url.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  return element;
}

// A fence of backticks has none behind it on its line: "```f(1)``` is code" is a line of text.
const FENCE = /^\s*(`{3,}(?=[^`]*$)|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)/;
const HEADING = /^(#{1,6})\s+(.*)/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const DEEPEST = 8; // of quotes in quotes; what is deeper is text

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

// The blocks of a text as plain data, so that those that have not changed can be told.
function parse(lines, depth = 0) {
  const blocks = [];
  let open = null; // the lines of a paragraph or an item that the next one may go on
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const [fence, heading, item] = [FENCE, HEADING, ITEM].map((kind) => kind.exec(line));
    const before = open;
    const first = at;
    open = null;
    if (!line.trim()) continue;
    if (fence) {
      do at++; while (at < lines.length && !closes(lines[at], fence[1]));
      blocks.push({ kind: "code", language: fence[2], text: lines.slice(first + 1, at).join("\n") });
    } else if (RULE.test(line)) {
      blocks.push({ kind: "hr" });
    } else if (heading) {
      blocks.push({ kind: `h${Math.min(heading[1].length + 1, 5)}`, lines: [heading[2]] });
    } else if (item) {
      const [kind, start] = item[1] === undefined ? ["ul"] : ["ol", Number(item[1])];
      if (blocks.at(-1)?.kind !== kind) blocks.push({ kind, start, items: [] });
      open = [item[2]];
      blocks.at(-1).items.push(open);
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      while (QUOTE.test(lines[at + 1] ?? "")) at++;
      const inside = lines.slice(first, at + 1).map((quoted) => quoted.replace(QUOTE, ""));
      blocks.push({ kind: "blockquote", blocks: parse(inside, depth + 1) });
    } else if (before) {
      open = before;
      open.push(line);
    } else {
      open = [line];
      blocks.push({ kind: "p", lines: open });
    }
  }
  return blocks;
}

function written(lines, parent) {
  for (const [index, line] of lines.entries()) inline(index ? `\n${line}` : line, parent);
  return parent;
}

function build(block) {
  if (block.kind === "code") return codeBlock(block);
  const element = make(block.kind);
  if (block.kind === "ol") element.start = block.start;
  element.append(...(block.items ?? []).map((item) => written(item, make("li"))));
  element.append(...(block.blocks ?? []).map(build));
  return written(block.lines ?? [], element);
}

function codeBlock({ language, text }) {
  const block = make("div", "block");
  const bar = make("div", "bar");
  const code = make("code");
  code.append(text);
  bar.append(make("span", "", language), button("Copy", (element) => copy(code.textContent, element)));
  const pre = make("pre");
  pre.append(code);
  block.append(bar, pre);
  return block;
}

// A code block that is still being written keeps its elements: its button may be in use, its text selected.
function rewrite(element, { kind, language, text }) {
  if (kind !== "code" || !element.matches(".block") || element.querySelector("span").textContent !== language) {
    return false;
  }
  const old = element.querySelector("code").firstChild;
  if (text.startsWith(old.data)) old.appendData(text.slice(old.length));
  else old.data = text;
  return true;
}

// Shows a text in an element that shows `old` already, and replaces no block before the first that differs.
export function show(text, parent, old) {
  const blocks = parse(text.split("\n"));
  const now = blocks.map((block) => JSON.stringify(block));
  let same = 0;
  while (same < old.length && old[same] === now[same]) same++;
  if (same < Math.min(old.length, now.length) && rewrite(parent.children[same], blocks[same])) same++;
  while (parent.children.length > same) parent.lastChild.remove();
  parent.append(...blocks.slice(same).map(build));
  return now;
}
