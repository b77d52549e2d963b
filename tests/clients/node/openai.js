// The real `openai` package against a running server: its address, and a folder of photos.
// test_openai_node.py starts the server and runs this.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import OpenAI from "openai";

const [base, photos] = [process.env.VISOR_BASE, process.env.VISOR_PHOTOS];
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0, timeout: 120_000 });
const model = "visor-demo";
const hello = [{ role: "user", content: "Hello" }];
const photo = `data:image/jpeg;base64,${readFileSync(`${photos}/cat.jpg`).toString("base64")}`;
const question = "What do you see in this image?";
const picture = [{
  role: "user",
  content: [{ type: "text", text: question }, { type: "image_url", image_url: { url: photo, detail: "auto" } }],
}];

const create = (more) => client.chat.completions.create({ model, max_tokens: 12, temperature: 0, ...more });

const aborts = async () => (await (await fetch(`${base}/stats`)).json()).engine.aborted;

test("a text", async () => {
  const answer = await create({ messages: hello });
  assert.ok(answer.choices[0].message.content);
  assert.deepEqual((await client.models.list()).data.map((one) => one.id), [model]);
});

test("a picture, streaming and not", async () => {
  const whole = await create({ messages: picture });
  assert.ok(whole.usage.prompt_tokens > 313);
  let text = "";
  let usage;
  for await (const chunk of await create({ messages: picture, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test("the helper that puts a stream together", async () => {
  const whole = await create({ messages: picture });
  const runner = client.chat.completions.stream({ model, max_tokens: 12, temperature: 0, messages: picture });
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
});

test("a response, streaming and not", async () => {
  const content = [{ type: "input_text", text: question }, { type: "input_image", detail: "auto", image_url: photo }];
  const wanted = { model, input: [{ role: "user", content }], max_output_tokens: 12, temperature: 0 };
  const whole = await client.responses.create(wanted);
  const final = await client.responses.stream(wanted).finalResponse();
  assert.ok(whole.output_text);
  assert.equal(final.output_text, whole.output_text);
});

test("errors are typed", async () => {
  await assert.rejects(create({ messages: hello, model: "no-such-model" }), OpenAI.NotFoundError);
  await assert.rejects(create({ messages: hello, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});

test("a closed stream is counted as an abort", async () => {
  const before = await aborts();
  const messages = [{ role: "user", content: "Go on and on" }];
  const stream = await create({ messages, max_tokens: 3000, logit_bias: JSON.parse(process.env.VISOR_ENDLESS), stream: true });
  for await (const _ of stream) break;
  stream.controller.abort();
  for (let tries = 0; (await aborts()) === before; tries += 1) {
    assert.ok(tries < 400, "the abort was not noticed");
    await new Promise((resume) => setTimeout(resume, 50));
  }
});
