"""What the schema says in words only, said to schemathesis in Python: what a picture is, which token
ids there are, and which combinations of fields are refused, or not looked at, although the schema has no words for it."""

import base64
import io
import re

import schemathesis
from hypothesis import strategies
from PIL import Image


def picture(kind, size):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


PICTURES = [picture(kind, size) for kind in ("PNG", "JPEG", "WEBP") for size in ((8, 8), (40, 24))]
# What a tool may be called, by the beginning of a path.
NAMES = {
    "/v1/chat": re.compile("[a-zA-Z0-9_-]{1,64}"),
    "/v1/responses": re.compile("[a-zA-Z0-9_-]{1,128}"),
    "/v1/messages": re.compile("[a-zA-Z0-9_-]{1,128}"),
    "/api/": re.compile("[a-zA-Z0-9_.:/-]{1,128}"),
}
BASE64 = strategies.sampled_from(PICTURES)

schemathesis.openapi.format("picture-base64", BASE64)
schemathesis.openapi.format("picture-url", BASE64.map(lambda data: f"data:image/png;base64,{data}"))
schemathesis.openapi.format("regular-expression", strategies.sampled_from(["yes|no", "[a-f]{3}", ""]))
schemathesis.openapi.format("token-id", strategies.integers(0, 500).map(str))


def tools(body, path):
    """No two tools have one name, whoever is named is among them, and what is called a schema is one: a generated object is not."""
    if path == "/api/generate":
        body.pop("tools", None)
    name = next(name for beginning, name in NAMES.items() if path.startswith(beginning))
    offered = body.get("tools") or []
    if not isinstance(offered, list):
        return
    for number, tool in enumerate(offered):
        for holder in (tool, tool.get("function") if isinstance(tool, dict) else None):
            if isinstance(holder, dict) and isinstance(holder.get("name"), str) and name.fullmatch(holder["name"]):
                holder["name"] = f"tool_{number}"
    choice = body.get("tool_choice")
    named = choice.get("function", choice) if isinstance(choice, dict) else None
    if choice == "required" or isinstance(choice, dict) and choice.get("type") == "any":
        if not offered:
            body["tool_choice"] = None
    elif isinstance(named, dict) and isinstance(named.get("name"), str) and name.fullmatch(named["name"]):
        named["name"] = "tool_0"
        if not offered:
            body["tool_choice"] = None


def schemas(value, key=""):
    if isinstance(value, list):
        return [schemas(item) for item in value]
    if not isinstance(value, dict):
        return value
    if key in ("schema", "parameters", "input_schema", "format") and value.get("type") in (None, "object"):
        return {"type": "object", "properties": {"sure": {"type": "boolean"}}}
    return {own: schemas(item, own) for own, item in value.items()}


def pictures(value):
    """A picture's address is one: made up in some phases from "a string" alone."""
    if isinstance(value, list):
        for item in value:
            pictures(item)
    elif isinstance(value, dict):
        for key, held in value.items():
            if key in ("url", "image_url") and isinstance(held, str) and not held.startswith("data:image/"):
                value[key] = f"data:image/png;base64,{PICTURES[0]}"
            elif key == "images" and isinstance(held, list):
                value[key] = [PICTURES[0] if isinstance(image, str) and image not in PICTURES else image for image in held]
            pictures(held)


@schemathesis.hook
def before_call(context, case, kwargs):
    if not isinstance(case.body, dict):
        return
    body = case.body
    path = case.operation.path
    if case.meta is not None and case.meta.generation.mode == schemathesis.GenerationMode.POSITIVE:
        pictures(body.get("messages", body.get("input")))
    # Text that is no picture in base64 counts as a violation when it is made up, and as no violation when it is refused.
    if path == "/api/generate":
        pictures(body)
    if path.startswith(("/v1/chat", "/v1/responses", "/v1/messages", "/api/")):
        body = case.body = schemas(body)
        tools(body, path)
    # Alternatives to a token are told only with the token.
    top = body.get("top_logprobs")
    if path.endswith("/chat/completions") and isinstance(top, (int, float)) and top > 0 and body.get("logprobs") in (None, False):
        body["logprobs"] = True
    crops = body.get("num_crops")
    if path.endswith("/chat/completions") and isinstance(crops, (int, float)) and 16 < crops < 2**64:
        body["num_crops"] = 16
    # All answers to all prompts are at most as many as `n` may be.
    prompts = body.get("prompt")
    if path == "/v1/completions" and isinstance(prompts, list) and len(prompts) > 1 and body.get("n") in (2, 3, 4):
        body["n"] = 1
    # The last message is not the assistant's.
    messages = body.get("messages")
    if path.startswith("/v1/messages") and isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") == "assistant":
            messages.append({"role": "user", "content": "Go on."})


@schemathesis.hook
def after_call(context, case, response):
    """No schema can say how many tokens a prompt is: one that is too long counts as too large, not as bad."""
    words = ("fit beside one token", "is too long", "maximum context length", "are left")
    if response.status_code == 400 and any(word in response.text for word in words):
        response.status_code = 413
