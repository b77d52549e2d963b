"""The real `langchain-openai` client against the real binary.

Run:  python3 tests/clients/test_langchain.py PATH/TO/visor
"""

import typing

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from served import ENDLESS, QUESTION, Served, main, photo


class LangChainClient(Served):
    def chat(self, **more):
        more = {"model": "visor-demo", "max_tokens": 12, "temperature": 0, **more}
        return ChatOpenAI(base_url=self.base + "/v1", api_key="unused", max_retries=0, timeout=120, **more)

    def picture(self):
        image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + photo("cat.jpg")}}
        return HumanMessage([{"type": "text", "text": QUESTION}, image])

    def test_a_text(self):
        reply = self.chat().invoke([SystemMessage("Be brief."), HumanMessage("Hello")])
        self.assertTrue(reply.content)
        self.assertIn(reply.response_metadata["finish_reason"], ["stop", "length"])
        self.assertGreater(reply.usage_metadata["input_tokens"], 0)

    def test_a_picture_streaming_and_not(self):
        whole = self.chat().invoke([self.picture()])
        self.assertGreater(whole.usage_metadata["input_tokens"], 313)
        pieces = list(self.chat(stream_usage=True).stream([self.picture()]))
        self.assertEqual("".join(piece.content for piece in pieces), whole.content)
        total = pieces[0]
        for piece in pieces[1:]:
            total += piece
        self.assertEqual(total.usage_metadata["total_tokens"], whole.usage_metadata["total_tokens"])

    def test_its_own_words_for_a_picture(self):
        image = {"type": "image", "base64": photo("cat.jpg"), "mime_type": "image/jpeg"}
        standard = HumanMessage([{"type": "text", "text": QUESTION}, image])
        self.assertEqual(self.chat().invoke([standard]).content, self.chat().invoke([self.picture()]).content)

    def test_a_batch_of_texts_is_one_request(self):
        text = OpenAI(base_url=self.base + "/v1", api_key="unused", model="visor-demo", max_tokens=4, temperature=0, max_retries=0)
        prompts = [f"{number} and" for number in range(20)]
        together = text.batch(prompts)
        self.assertEqual(len(together), 20)
        self.assertEqual(together[7], text.invoke(prompts[7]))

    def test_responses_say_the_same(self):
        whole = self.chat().invoke([self.picture()])
        other = self.chat(use_responses_api=True).invoke([self.picture()])
        self.assertEqual(other.text, whole.text)

    def test_bound_tools_are_called(self):
        @tool
        def weather(unit: typing.Literal["C", "F"]) -> str:
            """Tells the weather."""
            return f"21 {unit}"

        for more in [{}, {"use_responses_api": True}]:
            with self.subTest(**more):
                bound = self.chat(max_tokens=400, **more).bind_tools([weather], tool_choice="required")
                question = HumanMessage("Is it warm?")
                reply = bound.invoke([question])
                self.assertTrue(reply.tool_calls)
                results = [weather.invoke(call) for call in reply.tool_calls]
                self.assertTrue(results[0].content.startswith("21 "))
                streamed = None
                for piece in bound.stream([question]):
                    streamed = piece if streamed is None else streamed + piece
                self.assertEqual([call["args"] for call in streamed.tool_calls], [call["args"] for call in reply.tool_calls])
                free = self.chat(**more).bind_tools([weather])
                self.assertEqual(free.invoke([question, reply, *results]).type, "ai")

    def test_errors_are_typed(self):
        with self.assertRaises(openai.NotFoundError):
            self.chat(model="no-such-model").invoke("hi")
        with self.assertRaises(openai.BadRequestError) as bad:
            self.chat(temperature=9).invoke("hi")
        self.assertEqual(bad.exception.body["param"], "temperature")

    def test_a_closed_stream_is_counted_as_an_abort(self):
        before = self.aborts()
        stream = self.chat(max_tokens=3000, logit_bias=ENDLESS).stream("Go on and on")
        next(stream)
        stream.close()
        self.wait_aborted(before)


if __name__ == "__main__":
    main()
