/* Pictures and videos of a question: chosen, dropped or pasted; shown small; as the model sees them.
   A file is {name, kind, blob}. */
const KINDS = { jpg: "image/jpeg", jpeg: "image/jpeg", png: "image/png", gif: "image/gif", webp: "image/webp",
  bmp: "image/bmp", tif: "image/tiff", tiff: "image/tiff", mp4: "video/mp4", mov: "video/quicktime", webm: "video/webm",
  mkv: "video/x-matroska", avi: "video/x-msvideo", flv: "video/x-flv", ts: "video/mp2t", mpg: "video/mpeg",
  wmv: "video/x-ms-wmv" };
const addresses = new WeakMap();      /* blob: addresses of files that are shown */

/* a file of the browser as one of ours; null for what is neither a picture nor a video */
function readFile(file) {
  const ending = (file.name.match(/\.(\w+)$/) || ["", ""])[1].toLowerCase();
  /* browsers know .ts as a language, some none of .mkv */
  const type = KINDS[ending] || file.type || "";
  const kind = type.split("/")[0];
  if (kind !== "image" && kind !== "video") return null;
  const blob = file.type === type ? file : new Blob([file], { type: type });
  return { name: file.name, kind: kind, blob: blob };
}

/* a file as a data URL */
function dataUrl(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new ServerError(t("error_read", { name: file.name }), 0));
    reader.readAsDataURL(file.blob);
  });
}

function address(file) {
  if (!addresses.has(file.blob)) addresses.set(file.blob, URL.createObjectURL(file.blob));
  return addresses.get(file.blob);
}

function picture(file, attributes) {
  const src = address(file);
  if (file.kind === "video") return make("video", { src: src, muted: true, preload: "metadata", ...attributes });
  return make("img", { src: src, alt: file.name, ...attributes });
}

/* a small picture that shows its tiles when it is pressed */
function thumbnail(file, pictures) {
  const label = t("look", { name: file.name });
  return make("button", { type: "button", class: "thumbnail", "aria-label": label, title: label,
    click: () => showTiles(file, pictures()) }, picture(file, { draggable: "false" }),
    file.kind === "video" ? make("span", { class: "play", "aria-hidden": "true" }, "▶") : null);
}

/* a picture as the model sees it; `pictures` is how many its question has */
function showTiles(file, pictures) {
  const asked = new AbortController();
  dialog(file.name, async (body) => {
    const note = make("p", { class: "note", role: "status" }, t("tiles_wait"));
    const original = make("figure", { class: "original" }, picture(file, { controls: file.kind === "video" }));
    const board = make("div", { class: "tiles" }, original);
    body.append(note, board);
    try {
      const found = await readTiles(await dataUrl(file), optionValues().hd_num, pictures, asked.signal);
      const positions = found.positions.toLocaleString(language);
      note.textContent = t("tiles_text", { ...found.grid, size: found.tile_size, positions: positions });
      board.replaceChildren(make("figure", null, make("img", { src: found.whole, alt: t("tiles_whole") }),
        make("figcaption", null, t("tiles_whole"))), make("figure", { class: "cut" }, tileGrid(found),
        make("figcaption", null, t("tiles_cut"))));
    } catch (error) {
      if (error.name === "AbortError") return;
      note.className = "error";
      note.textContent = error.message;
    }
  }, true).then(() => asked.abort());
}

function tileGrid(found) {
  const grid = make("div", { class: "grid", style: `--columns: ${found.grid.columns}; --rows: ${found.grid.rows}` });
  found.tiles.forEach((tile, place) => {
    const row = Math.floor(place / found.grid.columns) + 1, column = place % found.grid.columns + 1;
    grid.append(make("img", { src: tile, alt: t("tile", { row: row, column: column }) }));
  });
  return grid;
}
