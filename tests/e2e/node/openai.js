// OpenAI's own client for Node against the HTTP API; prints what it was answered as one line of JSON.
//
//   node openai.js URL models|chat|stream|tool|error

import OpenAI from "openai";

const [url, what] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const request = { model: "tiny", messages, temperature: 0, max_completion_tokens: 12 };
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { day: { enum: ["today", "tomorrow"] } }, required: ["day"] },
  },
};

const CALLS = {
  models: async () => (await client.models.list()).data,
  chat: () => client.chat.completions.create(request),
  stream: async () => {
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = [];
    for await (const chunk of await client.chat.completions.create({ ...request, ...options })) chunks.push(chunk);
    return chunks;
  },
  tool: async () => {
    const stream = client.chat.completions.stream({
      ...request, max_completion_tokens: 200, tools: [weather], tool_choice: "required", parallel_tool_calls: false,
    });
    return (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  },
  error: () =>
    client.chat.completions.create({ ...request, temperature: 9 }).catch((error) => ({
      kind: error.constructor.name, status: error.status, param: error.param, code: error.code, id: error.requestID,
    })),
};

console.log(JSON.stringify(await CALLS[what]()));
