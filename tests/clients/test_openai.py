"""The real `openai` client and curl against the real binary.

Run:  python3 tests/clients/test_openai.py PATH/TO/visor
What is checked is structure, counts, determinism and errors; how well the
served demo model answers is the evaluation suite's business (tests/suite).
"""

import json
import pathlib
import statistics
import subprocess
import threading
import time
import typing

import openai
import pydantic

from served import ENDLESS, QUESTION, Served, main, photo


def data_uri(name, mime):
    return f"data:{mime};base64,{photo(name)}"


def ask(*uris, text=QUESTION):
    images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *images]}]


class Seen(pydantic.BaseModel):
    """What answers are held to; the order of its fields is not the alphabet's."""

    model_config = pydantic.ConfigDict(extra="forbid")

    sure: bool
    count: int = pydantic.Field(ge=1, le=99)
    animal: typing.Literal["cat", "dog", "octopus"]


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    unit: typing.Literal["C", "F"]
    days: int = pydantic.Field(ge=1, le=9)


class OpenAIClient(Served):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = openai.OpenAI(
            base_url=cls.base + "/v1", api_key="unused", max_retries=0, timeout=120,
            _strict_response_validation=True,
        )
        cls.model = cls.client.models.list().data[0].id

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        super().tearDownClass()

    def create(self, messages, **more):
        more = {"max_tokens": 12, "temperature": 0, **more}
        return self.client.chat.completions.create(model=self.model, messages=messages, **more)

    def stream(self, messages, **more):
        chunks = list(self.create(messages, stream=True, stream_options={"include_usage": True}, **more))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        return chunks, text, reasons

    def test_a_photo_as_jpeg_png_and_webp_streaming_and_not(self):
        answers = {}
        for name, mime in [("cat.jpg", "image/jpeg"), ("cat.png", "image/png"), ("cat.webp", "image/webp")]:
            with self.subTest(name):
                messages = ask(data_uri(name, mime))
                whole = self.create(messages)
                chunks, text, reasons = self.stream(messages)
                self.assertEqual(whole.choices[0].message.content, text)
                self.assertEqual(reasons, [whole.choices[0].finish_reason])
                self.assertEqual(len({c.id for c in chunks}), 1)
                self.assertEqual(chunks[-1].choices, [])
                self.assertEqual(chunks[-1].usage.total_tokens, whole.usage.total_tokens)
                self.assertGreater(whole.usage.prompt_tokens, 313)
                self.assertLessEqual(whole.usage.completion_tokens, 12)
                answers[name] = text
        # The same pixels in two lossless formats are the same question.
        self.assertEqual(answers["cat.png"], answers["cat.webp"])

    def test_a_lying_content_type_is_sniffed(self):
        honest = self.create(ask(data_uri("cat.png", "image/png")))
        lying = self.create(ask(data_uri("cat.png", "image/jpeg")))
        self.assertEqual(honest.choices[0].message.content, lying.choices[0].message.content)

    def test_several_images_turns_and_a_system_message(self):
        uri = data_uri("cat.jpg", "image/jpeg")
        one = self.create(ask(uri)).usage.prompt_tokens
        two = self.create(ask(uri, uri)).usage.prompt_tokens
        self.assertGreater(two, one + 313)
        messages = [{"role": "system", "content": "Be brief."}, *ask(uri),
                    {"role": "assistant", "content": "A cat."},
                    {"role": "user", "content": "What colour is it?"}]
        self.assertTrue(self.create(messages).choices[0].message.content)

    def test_text_only_with_plain_string_content(self):
        reply = self.create([{"role": "user", "content": "Hello"}], max_tokens=3)
        self.assertEqual(reply.usage.completion_tokens, 3)
        self.assertEqual(reply.choices[0].finish_reason, "length")

    def test_sampling_is_deterministic_given_a_seed(self):
        messages = [{"role": "user", "content": "Tell me a story"}]
        # As hot as it gets: the demo is sure of its few answers.
        same = {self.create(messages, temperature=2.0, seed=7).choices[0].message.content for _ in range(3)}
        other = {self.create(messages, temperature=2.0, seed=s).choices[0].message.content for s in range(8, 20)}
        self.assertEqual(len(same), 1)
        self.assertGreater(len(other), 1)

    def test_several_answers_streaming_and_not(self):
        messages = [{"role": "user", "content": "Tell me a story"}]
        hot = {"n": 3, "seed": 7, "temperature": 2.0}
        whole = self.create(messages, **hot)
        self.assertEqual([c.index for c in whole.choices], [0, 1, 2])
        texts = [c.message.content for c in whole.choices]
        self.assertEqual(texts[0], self.create(messages, seed=7, temperature=2.0).choices[0].message.content)
        streamed = ["", "", ""]
        for chunk in self.create(messages, stream=True, **hot):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        self.assertEqual(streamed, texts)
        with self.assertRaises(openai.BadRequestError) as bad:
            self.create(messages, n=100)
        self.assertEqual(bad.exception.body["param"], "n")

    def test_logprobs_add_up_to_the_text(self):
        messages = ask(data_uri("cat.jpg", "image/jpeg"))
        whole = self.create(messages, logprobs=True, top_logprobs=5).choices[0]
        tokens = whole.logprobs.content
        self.assertEqual(b"".join(bytes(t.bytes) for t in tokens).decode(), whole.message.content)
        for token in tokens:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 5)
            self.assertEqual(token.top_logprobs[0].token, token.token)
        chunks = self.create(messages, logprobs=True, top_logprobs=5, stream=True)
        streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        self.assertEqual([t.model_dump() for t in streamed], [t.model_dump() for t in tokens])

    def test_a_bias_penalties_and_stops_shape_the_answer(self):
        messages = ask(data_uri("cat.jpg", "image/jpeg"))
        text = self.create(messages, max_tokens=30).choices[0].message.content
        word = text.split()[1]
        cut = self.create(messages, max_tokens=30, stop=word).choices[0]
        self.assertEqual((cut.finish_reason, cut.message.content), ("stop", text[:text.index(word)]))
        first = self.client.post("/tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)["tokens"][0]
        banned = self.create(messages, logit_bias={str(first): -100}).choices[0].message.content
        self.assertNotEqual(banned[:1], text[:1])
        # The words of the answer are in the question, so a penalty on repetition forbids them.
        again = ask(data_uri("cat.jpg", "image/jpeg"), text=f"{QUESTION} {text}")
        said, penalized = (self.create(again, frequency_penalty=penalty / 50, extra_body={"repetition_penalty": penalty})
                           .choices[0].message.content for penalty in [1, 100])
        self.assertNotEqual(said, penalized)
        self.create(messages, user="u", store=True, metadata={"a": "b"}, response_format={"type": "text"})

    def test_an_answer_is_held_to_a_schema_an_object_or_an_expression(self):
        messages = ask(data_uri("cat.jpg", "image/jpeg"))
        parsed = self.client.chat.completions.parse(
            model=self.model, messages=messages, response_format=Seen, max_tokens=400, temperature=0)
        choice = parsed.choices[0]
        self.assertEqual(choice.finish_reason, "stop")
        self.assertIsInstance(choice.message.parsed, Seen)
        self.assertEqual(list(json.loads(choice.message.content)), ["sure", "count", "animal"])
        schema = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": Seen.model_json_schema()}}
        _, text, reasons = self.stream(messages, response_format=schema, max_tokens=400)
        self.assertEqual((text, reasons), (choice.message.content, ["stop"]))
        word = self.create(messages, response_format={"type": "regex", "regex": "(yes|no)!"}).choices[0]
        self.assertIn(word.message.content, ["yes!", "no!"])
        cut = self.create(messages, response_format={"type": "json_object"}, max_tokens=2).choices[0]
        self.assertTrue(cut.message.content.startswith("{"))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(messages, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}})
        self.assertEqual(caught.exception.param, "response_format")
        response = self.client.responses.parse(model=self.model, input="Which one?", text_format=Seen, max_output_tokens=400)
        self.assertIsInstance(response.output_parsed, Seen)

    def test_tools_are_called_streaming_and_not(self):
        messages = [{"role": "user", "content": "Is it warm?"}]
        more = {"tools": [openai.pydantic_function_tool(Weather, name="weather")], "max_tokens": 400,
                "parallel_tool_calls": False, "tool_choice": "required"}
        whole = self.create(messages, **more).choices[0]
        self.assertEqual((whole.finish_reason, whole.message.content), ("tool_calls", None))
        call = whole.message.tool_calls[0]
        self.assertEqual(call.function.name, "weather")
        arguments = Weather.model_validate_json(call.function.arguments)
        parsed = self.client.chat.completions.parse(model=self.model, messages=messages, temperature=0, **more)
        self.assertEqual(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, arguments)
        with self.client.chat.completions.stream(model=self.model, messages=messages, temperature=0, **more) as stream:
            last = stream.get_final_completion().choices[0]
        self.assertEqual(last.finish_reason, "tool_calls")
        self.assertEqual(last.message.tool_calls[0].function.parsed_arguments, arguments)
        self.assertNotEqual(last.message.tool_calls[0].id, call.id)
        messages += [whole.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "21"}]
        answer = self.create(messages, **{**more, "tool_choice": "none", "max_tokens": 12}).choices[0].message
        self.assertTrue(answer.content)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(messages, **{**more, "tool_choice": {"type": "function", "function": {"name": "missing"}}})
        self.assertEqual(caught.exception.param, "tool_choice")

    def test_responses_call_functions_streaming_and_not(self):
        parameters = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False}
        tools = [{"type": "function", "name": "weather", "description": "Tells it.", "parameters": parameters, "strict": True}]
        more = {"model": self.model, "tools": tools, "tool_choice": {"type": "function", "name": "weather"},
                "max_output_tokens": 400, "temperature": 0}
        whole = self.client.responses.create(input="Is it warm?", **more)
        call = whole.output[0]
        self.assertEqual((call.type, call.name), ("function_call", "weather"))
        self.assertIn(json.loads(call.arguments)["unit"], ["C", "F"])
        events = list(self.client.responses.create(input="Is it warm?", stream=True, **more))
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        self.assertEqual([e.arguments for e in done], [call.arguments])
        later = [{"role": "user", "content": "Is it warm?"}, call.model_dump(exclude_none=True),
                 {"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
        answer = self.client.responses.create(input=later, **{**more, "tool_choice": "auto", "max_output_tokens": 16})
        self.assertTrue(answer.output)

    def test_a_text_completion(self):
        more = {"model": self.model, "prompt": "I see", "max_tokens": 6, "temperature": 0}
        whole = self.client.completions.create(**more, logprobs=2)
        self.assertEqual("".join(whole.choices[0].logprobs.tokens), whole.choices[0].text)
        # The client knows no chunk without a reason, which OpenAI's own chunks are: not strict here.
        with openai.OpenAI(base_url=self.base + "/v1", api_key="unused", max_retries=0) as client:
            streamed = list(client.completions.create(**more, stream=True))
        self.assertEqual("".join(c.choices[0].text for c in streamed), whole.choices[0].text)
        with self.assertRaises(openai.BadRequestError):
            self.client.completions.create(**more, echo=True)

    def test_two_text_completions_at_once(self):
        prompts = ["I see", "The picture shows"]
        more = {"model": self.model, "max_tokens": 6, "temperature": 0}
        alone = [self.client.completions.create(**more, prompt=prompt) for prompt in prompts]
        whole = self.client.completions.create(**more, prompt=prompts)
        self.assertEqual([c.index for c in whole.choices], [0, 1])
        self.assertEqual([c.text for c in whole.choices], [one.choices[0].text for one in alone])
        for count in ["prompt_tokens", "completion_tokens", "total_tokens"]:
            self.assertEqual(getattr(whole.usage, count), sum(getattr(one.usage, count) for one in alone))
        # Not strict, as above.
        with openai.OpenAI(base_url=self.base + "/v1", api_key="unused", max_retries=0) as client:
            streamed = list(client.completions.create(**more, prompt=prompts, stream=True, stream_options={"include_usage": True}))
        choices = [chunk.choices[0] for chunk in streamed if chunk.choices]
        for told in whole.choices:
            own = [choice for choice in choices if choice.index == told.index]
            self.assertEqual("".join(choice.text for choice in own), told.text)
            self.assertEqual([c.finish_reason for c in own if c.finish_reason], [told.finish_reason])
        self.assertEqual(streamed[-1].usage.total_tokens, whole.usage.total_tokens)
        for wrong in [[], ["a"] * 129, [1, 2], [[1], [2]]]:
            with self.assertRaises(openai.BadRequestError) as bad:
                self.client.completions.create(**more, prompt=wrong)
            self.assertEqual(bad.exception.param, "prompt")

    def test_a_response_streaming_and_not(self):
        content = [{"type": "input_text", "text": QUESTION},
                   {"type": "input_image", "detail": "auto", "image_url": data_uri("cat.jpg", "image/jpeg")}]
        more = {"model": self.model, "input": [{"role": "user", "content": content}], "max_output_tokens": 12, "temperature": 0}
        whole = self.client.responses.create(**more)
        self.assertEqual(whole.output_text, self.create(ask(data_uri("cat.jpg", "image/jpeg"))).choices[0].message.content)
        events = list(self.client.responses.create(**more, stream=True))
        self.assertEqual("".join(e.delta for e in events if e.type == "response.output_text.delta"), whole.output_text)
        self.assertEqual(events[-1].response.output_text, whole.output_text)
        self.assertEqual(events[-1].response.usage.total_tokens, whole.usage.total_tokens)

    def test_detail_low_costs_fewer_tokens(self):
        def cost(detail):
            part = {"type": "image_url", "image_url": {"url": data_uri("cat.jpg", "image/jpeg"), "detail": detail}}
            return self.create([{"role": "user", "content": [part]}], max_tokens=1).usage.prompt_tokens
        self.assertLess(cost("low"), cost("auto"))
        self.assertLess(cost("auto"), cost("high"))

    def test_errors_are_typed(self):
        with self.assertRaises(openai.BadRequestError) as bad:
            self.create(ask("data:image/png;base64,bm90IGFuIGltYWdl"))
        self.assertIn("content[1]", bad.exception.body["param"])
        with self.assertRaises(openai.BadRequestError):
            self.create(ask("http://127.0.0.1:1/cat.png"))
        with self.assertRaises(openai.NotFoundError):
            self.client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
        with self.assertRaises(openai.BadRequestError) as bad:
            self.create([{"role": "user", "content": "hi"}], temperature=9)
        self.assertEqual(bad.exception.body["param"], "temperature")
        for error in [bad.exception.body]:
            self.assertEqual(set(error), {"message", "type", "param", "code"})
        with self.assertRaises(openai.BadRequestError) as bad:
            self.create([{"role": "user", "content": "word " * 6000}])
        self.assertEqual(bad.exception.body["code"], "context_length_exceeded")

    def test_a_closed_stream_is_counted_as_an_abort(self):
        before = self.aborts()
        stream = self.create([{"role": "user", "content": "Go on and on"}], max_tokens=3000, logit_bias=ENDLESS, stream=True)
        next(iter(stream))
        stream.close()
        self.wait_aborted(before)

    def test_curl(self):
        body = pathlib.Path(self.folder.name) / "body.json"
        body.write_text(json.dumps({"messages": ask(data_uri("cat.jpg", "image/jpeg")), "max_tokens": 4, "stream": True}))
        reply = subprocess.run(
            ["curl", "-sSN", self.base + "/v1/chat/completions", "-H", "content-type: application/json", "-d", f"@{body}"],
            capture_output=True, text=True, timeout=60, check=True).stdout
        events = [line for line in reply.split("\n\n") if line]
        self.assertTrue(all(e.startswith("data: ") for e in events), reply)
        self.assertEqual(events[-1], "data: [DONE]")
        self.assertEqual(json.loads(events[0][6:])["object"], "chat.completion.chunk")


class FullServer(Served):
    config = "[server]\nrequests_in_flight_max = 1\n"
    # The longest that turning somebody away may take, in the middle of many.
    REFUSED_S = 0.05

    def setUp(self):
        more = {"base_url": self.base + "/v1", "api_key": "unused", "timeout": 120}
        self.client = self.enterContext(openai.OpenAI(max_retries=0, **more))
        self.patient = self.enterContext(openai.OpenAI(max_retries=5, **more))
        self.model = self.client.models.list().data[0].id
        asked = {"model": self.model, "messages": ask(), "max_tokens": 3000, "stream": True, "logit_bias": ENDLESS}
        self.busy = self.patient.chat.completions.create(**asked)
        next(iter(self.busy))

    def tearDown(self):
        self.busy.close()

    def short(self, client):
        return client.chat.completions.create(model=self.model, messages=ask(), max_tokens=4)

    def test_who_finds_it_full_is_told_so_at_once(self):
        took = []
        for _ in range(40):
            began = time.monotonic()
            with self.assertRaises(openai.InternalServerError) as full:
                self.short(self.client)
            took.append(time.monotonic() - began)
            self.assertEqual(full.exception.status_code, 503)
            self.assertGreater(int(full.exception.response.headers["retry-after"]), 0)
            self.assertTrue(full.exception.body["message"])
        print(f"turned away in {1000 * statistics.median(took):.1f} ms in the middle, {1000 * max(took):.1f} at most")
        self.assertLess(statistics.median(took), self.REFUSED_S)

    def test_the_clients_own_retry_recovers(self):
        leaving = threading.Timer(0.5, self.busy.close)
        leaving.start()
        self.addCleanup(leaving.join)
        self.assertTrue(self.short(self.patient).choices)


if __name__ == "__main__":
    main()
