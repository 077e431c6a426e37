// OpenAI's client for Node: `node openai.mjs URL KEY MODEL MESSAGES`, a report as JSON.
import OpenAI from "openai";

const [url, key, model, text] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const messages = JSON.parse(text);
const ask = (more) => client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 8, ...more });

const report = { models: [], streamed: "" };
for await (const known of client.models.list()) report.models.push(known.id);

const { message } = (await ask()).choices[0];
report.said = message.content;
for await (const event of await ask({ stream: true })) report.streamed += event.choices[0]?.delta?.content ?? "";

const turns = [...messages, { ...message, reasoning_content: "a key of somebody's" }, { role: "user", content: "And of Italy?" }];
report.again = (await ask({ messages: turns })).choices[0].message.content;

try {
  await ask({ messages: [{ role: "user", content: "word ".repeat(9000) }] });
} catch (error) {
  report.status = error.status;
  report.code = error.code;
}
console.log(JSON.stringify(report));
