/* What is asked: a conversation as OpenAI's messages, and as a file. */
const addressesOf = new WeakMap();     /* blob: its data URL, made once */

async function partOf(file) {
  if (!addressesOf.has(file.blob)) addressesOf.set(file.blob, await dataUrl(file));
  const kind = file.kind === "video" ? "video_url" : "image_url";
  return { type: kind, [kind]: { url: addressesOf.get(file.blob) } };
}

async function userMessage(message) {
  if (message.files.length === 0) return { role: "user", content: message.text };
  const parts = await Promise.all(message.files.map(partOf));
  return { role: "user", content: message.text ? [...parts, { type: "text", text: message.text }] : parts };
}

/* pairs of question and answer; a question without an answer is left out unless it is the last */
function rounds(messages) {
  return messages.filter((message, place) => {
    const next = messages[place + 1];
    return message.role === "user" ? !next || (next.role === "assistant" && hasText(next)) : hasText(message);
  });
}

const hasText = (message) => message.text.trim() !== "";

/* pictures and videos that the model would see */
const picturesOf = (messages) => rounds(messages).reduce((sum, one) => sum + (one.files ? one.files.length : 0), 0);

async function wireMessages(messages) {
  const found = [];
  for (const message of rounds(messages)) {
    found.push(message.role === "user" ? await userMessage(message) : { role: "assistant", content: message.text });
  }
  return found;
}

async function exportConversation(conversation) {
  const messages = [];
  for (const message of conversation.messages) {
    messages.push(message.role === "user" ? await userMessage(message) : { role: "assistant", content: message.text });
  }
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_+|_+$/g, "").slice(0, 60);
  const created = new Date(conversation.created).toISOString();
  const content = { title: conversation.title, created: created, messages: messages };
  download((name || "conversation") + ".json", JSON.stringify(content, null, 1), "application/json");
}
