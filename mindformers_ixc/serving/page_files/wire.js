/* The server: its models, questions and their answers, tiles; what goes wrong as sentences. */
class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const headers = {}, key = kept("key", sessionStorage);
  if (key) headers.Authorization = "Bearer " + key;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers: headers, signal: signal, cache: "no-store",
      body: body ? JSON.stringify(body) : undefined });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(t("error_unreachable"), 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/* the sentence of a refusal */
async function failure(response) {
  let text = t("error_status", { status: response.status });
  try {
    text = sentence(await response.json()) || text;
  } catch { /* no JSON: of a proxy, say */ }
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) text += " " + t("error_later", { seconds: wait });
  return new ServerError(text, response.status);
}

function sentence(body) {
  const text = body && body.error && body.error.message;
  return typeof text === "string" ? text : "";
}

async function readModels() {
  return (await (await call("v1/models")).json()).data;
}

async function readTiles(image, hdNum, pictures, signal) {
  const body = { image: image, pictures: pictures };
  if (hdNum) body.hd_num = hdNum;
  return (await call("v1/ixc/tiles", body, signal)).json();
}

/* asks; `show` gets the text so far. Gives {text, finish, usage, first, seconds} */
async function askServer(body, signal, show) {
  const began = performance.now();
  const answer = { text: "", finish: "", usage: null, first: null, seconds: 0 };
  const response = await call("v1/chat/completions", body, signal);
  const took = () => (performance.now() - began) / 1000;
  if (!body.stream) {
    const whole = await response.json();
    Object.assign(answer, { text: whole.choices[0].message.content || "", finish: whole.choices[0].finish_reason,
      usage: whole.usage, seconds: took() });
    show(answer);
    return answer;
  }
  let ended = false;
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") { ended = true; break; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk), 0);
    answer.usage = chunk.usage || answer.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    answer.finish = choice.finish_reason || answer.finish;
    if (choice.delta.content) {
      if (answer.first === null) answer.first = took();
      answer.text += choice.delta.content;
      answer.seconds = took();
      show(answer);
    }
  }
  answer.seconds = took();
  if (!ended) throw new ServerError(t("error_cut"), 0);
  return answer;
}

/* the data of server-sent events */
async function* events(response, signal) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  while (true) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ServerError(t("error_cut"), 0);
    }
    if (piece.done) return;
    rest += decoder.decode(piece.value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield data;
    }
  }
}
