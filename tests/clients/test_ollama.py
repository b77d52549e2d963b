"""The real `ollama` client against the real binary.

Run:  python3 tests/clients/test_ollama.py PATH/TO/visor
"""

import json

import ollama

from served import PHOTOS, QUESTION, Served, main


class OllamaClient(Served):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = ollama.Client(host=cls.base)

    def ask(self, **more):
        message = {"role": "user", "content": QUESTION, "images": [str(PHOTOS / "cat.jpg")]}
        return self.client.chat(model="visor-demo", messages=[message], options={"num_predict": 12, "temperature": 0}, **more)

    def test_a_chat_streaming_and_not(self):
        whole = self.ask()
        self.assertTrue(whole.message.content)
        self.assertTrue(whole.done)
        self.assertGreater(whole.prompt_eval_count, 313)
        pieces = list(self.ask(stream=True))
        self.assertEqual("".join(p.message.content for p in pieces), whole.message.content)
        self.assertEqual(pieces[-1].eval_count, whole.eval_count)
        self.assertEqual(pieces[-1].done_reason, whole.done_reason)

    def test_a_prompt_streaming_and_not(self):
        options = {"num_predict": 8, "temperature": 0}
        whole = self.client.generate(model="visor-demo", prompt="Hello", options=options)
        pieces = self.client.generate(model="visor-demo", prompt="Hello", options=options, stream=True)
        self.assertEqual("".join(p.response for p in pieces), whole.response)

    def test_an_answer_is_held_to_a_schema(self):
        schema = {"type": "object", "properties": {"sure": {"type": "boolean"}, "animal": {"enum": ["cat", "dog"]}},
                  "required": ["sure", "animal"], "additionalProperties": False}
        options = {"num_predict": 400, "temperature": 0}
        for streams in [False, True]:
            answer = self.client.generate(model="visor-demo", prompt="Which?", format=schema, options=options, stream=streams)
            text = "".join(piece.response for piece in answer) if streams else answer.response
            self.assertEqual(list(json.loads(text)), ["sure", "animal"])
        opened = self.client.generate(model="visor-demo", prompt="Which?", format="json", options={"num_predict": 2})
        self.assertTrue(opened.response.startswith("{"))

    def test_a_chat_offers_tools(self):
        def weather(unit: str) -> str:
            """Tells the weather."""
            return f"21 {unit}"

        messages = [{"role": "user", "content": "Is it warm?"}]
        options = {"num_predict": 12, "temperature": 0}
        answer = self.client.chat(model="visor-demo", messages=messages, tools=[weather], options=options)
        plain = self.client.chat(model="visor-demo", messages=messages, options=options)
        self.assertTrue(answer.message.content or answer.message.tool_calls)
        self.assertGreater(answer.prompt_eval_count, plain.prompt_eval_count)
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"unit": "C"}}}]},
            {"role": "tool", "tool_name": "weather", "content": weather("C")},
        ]
        later = self.client.chat(model="visor-demo", messages=messages, tools=[weather], options=options)
        self.assertGreater(later.prompt_eval_count, answer.prompt_eval_count)

    def test_what_it_tells_of_the_model(self):
        names = [model.model for model in self.client.list().models]
        self.assertEqual(names, ["visor-demo"])
        self.assertEqual(self.client.show("visor-demo").capabilities, ["completion", "tools", "vision"])

    def test_a_model_is_loaded_and_told_to_be_gone(self):
        for ask in [self.client.chat, self.client.generate]:
            self.assertEqual(ask(model="visor-demo").done_reason, "load")
            self.assertEqual(ask(model="visor-demo", keep_alive=0).done_reason, "unload")
            self.assertEqual(ask(model="visor-demo", keep_alive="0s").done_reason, "unload")
        running = self.client.ps().models
        self.assertEqual([model.model for model in running], ["visor-demo"])
        info = self.client.show("visor-demo").modelinfo
        self.assertIn(running[0].context_length, [value for key, value in info.items() if key.endswith(".context_length")])

    def test_errors_are_typed(self):
        with self.assertRaises(ollama.ResponseError) as missing:
            self.client.chat(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
        self.assertEqual(missing.exception.status_code, 404)
        self.assertIn("no-such-model", missing.exception.error)
        with self.assertRaises(ollama.ResponseError) as bad:
            self.client.generate(model="visor-demo", prompt="hi", format={"type": "nothing"})
        self.assertEqual(bad.exception.status_code, 400)
        with self.assertRaises(ollama.ResponseError) as thinking:
            self.client.generate(model="visor-demo", prompt="hi", think=True)
        self.assertEqual(thinking.exception.status_code, 400)
        self.assertEqual(thinking.exception.error, '"visor-demo" does not support thinking')


if __name__ == "__main__":
    main()
