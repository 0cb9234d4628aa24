/* Conversations in the browser: all of them in memory, each change written to IndexedDB. A conversation is
   {id, title, created, changed, messages}; a message {role, text, files} of the user, {role, text, mode, state, ...} of
   the model. */
const Store = { all: [], base: null, failed: () => {}, elsewhere: () => {} };
const tabs = new BroadcastChannel("mindformers_ixc");       /* says to other tabs which conversation has changed */

function request(made) {
  return new Promise((done, fail) => {
    made.onsuccess = () => done(made.result);
    made.onerror = () => fail(made.error);
  });
}

Store.open = async function () {
  try {
    const opening = indexedDB.open("mindformers_ixc", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    Store.base = await request(opening);
    Store.all = await request(reading().getAll());
    tabs.onmessage = async (event) => Store.elsewhere(event.data, await request(reading().get(event.data)));
  } catch {
    Store.base = null;        /* a private window, say: conversations last as long as the page */
  }
  for (const one of Store.all) {
    for (const message of one.messages) if (message.state === "running") message.state = "stopped";
  }
  Store.all.sort((a, b) => b.changed - a.changed);
};

Store.add = function () {
  const now = Date.now(), id = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const made = { id: id, title: "", created: now, changed: now, messages: [] };
  Store.all.unshift(made);
  return made;
};

const reading = () => Store.base.transaction("conversations").objectStore("conversations");
const writing = () => Store.base.transaction("conversations", "readwrite").objectStore("conversations");

Store.save = async function (conversation) {
  if (!Store.all.includes(conversation)) return;       /* deleted while an answer was written */
  if (conversation.messages.length === 0) return;
  if (Store.base === null) return Store.failed();
  try {
    await request(writing().put(conversation));
    tabs.postMessage(conversation.id);
  } catch {
    Store.failed();
  }
};

Store.drop = (conversation) => { Store.all = Store.all.filter((one) => one !== conversation); };

Store.remove = async function (conversation) {
  Store.drop(conversation);
  if (Store.base === null) return;
  try {
    await request(writing().delete(conversation.id));
    tabs.postMessage(conversation.id);
  } catch {
    Store.failed();
  }
};

/* a new question makes a conversation the latest */
Store.touch = function (conversation) {
  conversation.changed = Date.now();
  Store.all = [conversation, ...Store.all.filter((one) => one !== conversation)];
};
