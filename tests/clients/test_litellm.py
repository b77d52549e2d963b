"""The real `litellm` against the real binary, in three of the dialects that it speaks.

Run:  python3 tests/clients/test_litellm.py PATH/TO/visor
"""

import os

# It would fetch the prices of models from the network when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from served import ENDLESS, QUESTION, Served, main, photo

litellm.telemetry = False


class LiteLLMClient(Served):
    def ask(self, content, provider="openai", **more):
        base = self.base + ("/v1" if provider == "openai" else "")
        more = {"max_tokens": 12, "temperature": 0, "model": f"{provider}/visor-demo", **more}
        return litellm.completion(
            messages=[{"role": "user", "content": content}], api_base=base, api_key="unused",
            num_retries=0, timeout=120, **more)

    def picture(self):
        image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + photo("cat.jpg")}}
        return [{"type": "text", "text": QUESTION}, image]

    def test_a_text(self):
        self.assertTrue(self.ask("Hello").choices[0].message.content)

    def test_a_picture_streaming_and_not_in_every_dialect(self):
        said = set()
        for provider in ["openai", "anthropic", "ollama_chat"]:
            with self.subTest(provider):
                whole = self.ask(self.picture(), provider)
                self.assertGreater(whole.usage.prompt_tokens, 313)
                pieces = list(self.ask(self.picture(), provider, stream=True))
                text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
                self.assertEqual(text, whole.choices[0].message.content)
                self.assertIn(pieces[-1].choices[0].finish_reason, ["stop", "length"])
                said.add(text)
        self.assertEqual(len(said), 1, "one question, whoever asks it")

    def test_errors_are_typed(self):
        with self.assertRaises(litellm.NotFoundError):
            self.ask("hi", model="openai/no-such-model")
        with self.assertRaises(litellm.NotFoundError):
            self.ask("hi", "anthropic", model="anthropic/no-such-model")
        with self.assertRaises(litellm.BadRequestError):
            self.ask("hi", temperature=9)
        with self.assertRaises(litellm.ContextWindowExceededError):
            self.ask("word " * 6000)

    def test_a_closed_stream_is_counted_as_an_abort(self):
        before = self.aborts()
        stream = self.ask("Go on and on", max_tokens=3000, logit_bias=ENDLESS, stream=True)
        next(iter(stream))
        stream.completion_stream.close()
        self.wait_aborted(before)


if __name__ == "__main__":
    main()
