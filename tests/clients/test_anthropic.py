"""The real `anthropic` client against the real binary.

Run:  python3 tests/clients/test_anthropic.py PATH/TO/visor
"""

import anthropic

from served import QUESTION, Served, main, photo


WEATHER = {"name": "weather", "description": "Tells the weather.", "input_schema": {
    "type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["unit"]}}


class AnthropicClient(Served):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = anthropic.Anthropic(
            base_url=cls.base, api_key="unused", max_retries=0, timeout=120,
            _strict_response_validation=True,
        )

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        super().tearDownClass()

    def ask(self, **more):
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": photo("cat.jpg")}}
        content = [image, {"type": "text", "text": QUESTION}]
        return {"model": "visor-demo", "max_tokens": 12, "messages": [{"role": "user", "content": content}], **more}

    def test_a_message_streaming_and_not(self):
        whole = self.client.messages.create(**self.ask())
        self.assertEqual(whole.content[0].type, "text")
        self.assertIn(whole.stop_reason, ["end_turn", "max_tokens"])
        with self.client.messages.stream(**self.ask()) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        self.assertEqual(text, whole.content[0].text)
        self.assertEqual(last.content[0].text, text)
        self.assertEqual(last.stop_reason, whole.stop_reason)
        self.assertEqual(last.usage.output_tokens, whole.usage.output_tokens)

    def test_tokens_are_counted_as_they_are_used(self):
        body = self.ask()
        usage = self.client.messages.create(**body).usage
        del body["max_tokens"]
        count = self.client.messages.count_tokens(**body).input_tokens
        self.assertEqual(count, usage.input_tokens + usage.cache_read_input_tokens)

    def test_an_answer_is_at_most_as_long_as_it_may_be(self):
        ends = ["end_turn", "model_context_window_exceeded"]
        body = self.ask(max_tokens=100_000)
        whole = self.client.messages.create(**body)
        self.assertIn(whole.stop_reason, ends)
        with self.client.messages.stream(**body) as stream:
            last = stream.get_final_message()
        self.assertEqual((last.content[0].text, last.stop_reason), (whole.content[0].text, whole.stop_reason))

    def test_what_was_thought_before_is_left_out(self):
        said = {"type": "text", "text": "A cat."}
        thought = {"type": "thinking", "thinking": "It purrs.", "signature": "AAAA"}
        redacted = {"type": "redacted_thinking", "data": "AAAA"}
        usage = []
        for content in [[said], [thought, redacted, said]]:
            body = self.ask()
            body["messages"] += [
                {"role": "assistant", "content": content},
                {"role": "user", "content": "What colour?"},
            ]
            answer = self.client.messages.create(**body)
            self.assertTrue(answer.content)
            usage.append(answer.usage.input_tokens + answer.usage.cache_read_input_tokens)
        self.assertEqual(usage[0], usage[1])

    def test_a_stop_sequence_is_told(self):
        text = self.client.messages.create(**self.ask(max_tokens=30)).content[0].text
        word = text.split()[1]
        cut = self.client.messages.create(**self.ask(max_tokens=30, stop_sequences=[word]))
        self.assertEqual((cut.stop_reason, cut.stop_sequence), ("stop_sequence", word))

    def test_models_are_listed_and_found(self):
        models = list(self.client.models.list())
        self.assertEqual([model.id for model in models], ["visor-demo"])
        self.assertEqual((models[0].type, models[0].display_name), ("model", "visor-demo"))
        self.assertGreater(models[0].created_at.year, 2000)
        self.assertEqual(self.client.models.retrieve("visor-demo"), models[0])
        with self.assertRaises(anthropic.NotFoundError) as missing:
            self.client.models.retrieve("no-such-model")
        self.assertEqual(missing.exception.body["error"]["type"], "not_found_error")

    def test_errors_are_typed(self):
        with self.assertRaises(anthropic.NotFoundError):
            self.client.messages.create(**self.ask(model="no-such-model"))
        with self.assertRaises(anthropic.BadRequestError) as bad:
            self.client.messages.create(**self.ask(extra_body={"temperature": 3}))
        self.assertEqual(bad.exception.body["error"]["type"], "invalid_request_error")
        with self.assertRaises(anthropic.BadRequestError):
            self.client.messages.create(**self.ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]))

    def test_a_tool_is_used_streaming_and_not(self):
        body = {"model": "visor-demo", "max_tokens": 400, "messages": [{"role": "user", "content": "Is it warm?"}],
                "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}
        whole = self.client.messages.create(**body)
        self.assertEqual(whole.stop_reason, "tool_use")
        use = whole.content[0]
        self.assertEqual((use.type, use.name), ("tool_use", "weather"))
        self.assertIn(use.input["unit"], ["C", "F"])
        with self.client.messages.stream(**body) as stream:
            last = stream.get_final_message()
        self.assertEqual((last.content[0].type, last.stop_reason), ("tool_use", "tool_use"))
        self.assertIn(last.content[0].input["unit"], ["C", "F"])
        body["messages"] += [
            {"role": "assistant", "content": [use.model_dump(include={"type", "id", "name", "input"})]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "21"}]},
        ]
        answer = self.client.messages.create(**{**body, "max_tokens": 12, "tool_choice": {"type": "auto"}})
        self.assertTrue(answer.content)


if __name__ == "__main__":
    main()
