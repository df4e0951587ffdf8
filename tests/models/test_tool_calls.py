"""Calls of tools: written by published templates and read back, and answers that hold none or broken ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.models.chat_template import PLAIN, ChatTemplate
from services.models.chat_tokenizer import ChatTokenizer
from services.models.tool_calls import Segment, ToolFormat, format_of, marks_of, read_answer
from services.source.answers.chat_prompt import ChatPrompts
from services.wire.messages import Message, Messages
from tests.fakes.files.tool_templates import FORMATS, template_text, tool_prompts, tool_tokenizer
from tests.fakes.real_tokenizers import folder

DATE = "26 Jul 2024"  # Llama's templates show one
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Find.", "parameters": {"type": "object"}}}
LOOK_ALIKES = (
    "<|im_end|>", "<|eot_id|>", "<|python_tag|>", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<tool_call>",
    "</tool_call>", "</tool_response>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<|im_start|>assistant\n",
)  # fmt: skip
WORDS = st.lists(st.sampled_from(["cat", " é👍", "\n", '"', "{}", "\\", "<", *LOOK_ALIKES]), max_size=4).map("".join)
VALUES = st.one_of(WORDS, st.integers(-9, 9), st.booleans(), st.none(), st.lists(WORDS, max_size=2))
ARGUMENTS = st.dictionaries(st.sampled_from(["word", "language", "limit"]), VALUES, max_size=3)


def called(name: str, arguments: Any) -> Message:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def encoded(prompts: ChatPrompts, messages: list[Message], *, begun: bool) -> list[int]:
    assert prompts._chat is not None
    ids: list[int] = prompts._chat.encode_messages(Messages(messages, [TOOL]), add_generation_prompt=begun).tolist()
    return ids


@pytest.mark.parametrize("family", FORMATS)
@given(arguments=ARGUMENTS, question=WORDS)
@settings(max_examples=25, deadline=None)
def test_what_a_published_template_writes_is_read_back(family: str, arguments: dict[str, Any], question: str) -> None:
    """Whatever is in the arguments: they stand in the tokens as the template writes them, and are read from these."""
    check_round_trip(tool_prompts(family), arguments, f"a {question}.")


def check_round_trip(prompts: ChatPrompts, arguments: dict[str, Any], question: str) -> None:
    messages = [{"role": "user", "content": question}, called("look_up", arguments)]
    before, whole = encoded(prompts, messages[:1], begun=True), encoded(prompts, messages, begun=False)
    # White space at the end of the beginning may melt with the answer's, and DeepSeek's has a mark of thinking there.
    same = next((n for n, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    assert same >= len(before) - 6
    read = prompts.read_calls(whole[same:])
    assert (read.problem, [(call.name, call.arguments) for call in read.calls]) == ("", [("look_up", arguments)])
    assert read.words.strip() in {"", "<think>\n\n</think>"}


@pytest.mark.parametrize("family", FORMATS)
@given(words=WORDS, result=WORDS, arguments=ARGUMENTS)
@settings(max_examples=25, deadline=None)
def test_words_of_users_and_tools_become_no_control_tokens(
    family: str, words: str, result: str, arguments: dict[str, Any]
) -> None:
    """Neither do they become the tokens around calls and results; and the text is that of transformers."""
    tools = None if family == "deepseekv3" else [TOOL]
    check_words(tool_prompts(family), tool_tokenizer(family), (words, result, arguments), tools)


def check_words(prompts: ChatPrompts, tokenizer: Any, given: tuple[str, str, Any], tools: list[Any] | None) -> None:
    words, result, arguments = given

    def conversation(said: str, found: str, given: dict[str, Any]) -> list[Message]:
        first, last = {"role": "user", "content": f"a{said}b"}, {"role": "user", "content": f"c{said}d"}
        answer = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": f"e{found}f"}
        return [first, called("look_up", given), answer, {"role": "assistant", "content": "No."}, last]

    def marks(messages: list[Message]) -> list[int]:
        added = set(tokenizer.added_tokens_encoder.values())
        return [token for token in prompts.token_ids(Messages(messages, tools).to_bytes(), "m") if token in added]

    messages = conversation(words, result, arguments)
    assert marks(messages) == marks(conversation("", "", {}))
    ids = prompts.token_ids(Messages(messages, tools).to_bytes(), "m")
    written = json.loads(json.dumps(messages))
    if tools is None:  # DeepSeek's template puts arguments into the text as they are
        written[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    else:
        written[1]["content"] = ""  # Qwen3's cannot write null
    text = tokenizer.apply_chat_template(
        written, tools=tools, add_generation_prompt=True, tokenize=False, date_string=DATE
    )
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_result_stays_words_where_no_tool_is_named() -> None:
    prompts, added = tool_prompts("qwen2_5"), set(tool_tokenizer("qwen2_5").added_tokens_encoder.values())

    def marks(found: str) -> list[int]:
        messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": f"e{found}f"}]
        return [token for token in prompts.token_ids(Messages(messages).to_bytes(), "m") if token in added]

    assert marks("<tool_call>{}</tool_call>") == marks("")


@pytest.mark.drill
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_real_tokenizers_with_the_templates_that_they_bring(family: str) -> None:
    path = folder(family)
    chat = ChatTokenizer.from_pretrained(path)
    prompts, tokenizer = ChatPrompts(path, chat.vocabulary, chat), load_tokenizer(path).tokenizer
    tools = None if family == "deepseek_v3" else [TOOL]
    for words in (*LOOK_ALIKES, "数字 " + "".join(LOOK_ALIKES)):
        arguments = {"word": f"é {words}", "limit": 3}
        check_round_trip(prompts, arguments, f"a {words}.")
        check_words(prompts, tokenizer, (words, words, arguments), tools)


def test_the_tokens_of_mistral_s_own_library_are_read() -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    wanted = [("look_up", {"word": 'é "👍" [TOOL_CALLS]'}), ("add", {"a": [1, 2.5], "b": None})]
    calls = [
        ToolCall(id=f"abcdefgh{n}", function=FunctionCall(name=name, arguments=json.dumps(arguments)))
        for n, (name, arguments) in enumerate(wanted)
    ]
    results = [ToolMessage(tool_call_id=call.id, name=call.function.name, content="4") for call in calls]
    tokenizer: Any = MistralTokenizer.v3()
    asked = [UserMessage(content="Hi"), AssistantMessage(content=None, tool_calls=calls)]
    request: Any = ChatCompletionRequest(messages=[*asked, *results])
    ids, pieces = tokenizer.encode_chat_completion(request).tokens, tokenizer.instruct_tokenizer.tokenizer
    names = [pieces.id_to_piece(token) for token in ids]
    answer = ids[names.index("[TOOL_CALLS]") + 1 : names.index("</s>")]
    read = read_answer("mistral", [Segment("", ""), Segment("[TOOL_CALLS]", pieces.decode(answer))])
    assert (read.problem, [(call.name, call.arguments) for call in read.calls]) == ("", wanted)


DEEPSEEK = {name: f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")}


def answer(*parts: str) -> list[Segment]:
    """Segments: the first words, then marks and texts in turns."""
    return [Segment("", parts[0]), *(Segment(*parts[n : n + 2]) for n in range(1, len(parts), 2))]


@pytest.mark.parametrize(
    ("form", "segments", "words", "calls"),
    [
        ("hermes", answer("Just words, 3 < 4."), "Just words, 3 < 4.", []),
        ("hermes", answer("Wait.\n", "<tool_call>", '{"name": "f", "arguments": "{\\"a\\": 1}"}'), "Wait.", [{"a": 1}]),
        ("llama3", answer('{"name": "Bob", "age": 3}'), '{"name": "Bob", "age": 3}', []),
        ("llama3", answer("", "<|python_tag|>", "1 + 1"), "", [{"code": "1 + 1"}]),
        ("llama3", answer("So.", "<|python_tag|>", 'f.call(a="x", b=[1])'), "So.", [{"a": "x", "b": [1]}]),
        ("llama3", answer('{"type": "function", "name": "f", "parameters": {}}'), "", [{}]),
        ("mistral", answer("", "[TOOL_CALLS]", "f", "[ARGS]", '{"a": 1}', "[TOOL_CALLS]", "g", "[ARGS]", "{}"), "",
         [{"a": 1}, {}]),
        ("mistral", answer("", "[TOOL_CALLS]", "f", "[CALL_ID]", "abc", "[ARGS]", '{"a": 1}'), "", [{"a": 1}]),
        ("internlm2", answer("Sure.", "<|action_start|>", "", "<|interpreter|>", "\n```python\nprint(1)\n```",
                             "<|action_end|>", ""), "Sure.", [{"code": "print(1)"}]),
        ("deepseek", answer("", DEEPSEEK["calls▁begin"], "", DEEPSEEK["call▁begin"], "f", DEEPSEEK["sep"], '{"a": 1}',
                            DEEPSEEK["call▁end"], "", DEEPSEEK["calls▁end"], ""), "", [{"a": 1}]),
        ("code_block", answer("So:\n```python\nprint(1)\n```\nIt prints 2."), "So:\n```python\nprint(1)\n```",
         [{"code": "print(1)\n"}]),
        ("code_block", answer("```json\n{}\n```"), "```json\n{}\n```", []),
    ],
)  # fmt: skip
def test_answers_of_other_forms(form: ToolFormat, segments: list[Segment], words: str, calls: list[Any]) -> None:
    read = read_answer(form, segments)
    assert (read.words, [call.arguments for call in read.calls], read.problem) == (words, calls, "")


@pytest.mark.parametrize(
    ("form", "segments"),
    [
        ("hermes", answer("Hm. ", "<tool_call>", '{"name": "f"')),
        ("hermes", answer("", "<tool_call>", '{"arguments": {}}')),
        ("hermes", answer("", "<tool_call>", '{"name": "f", "arguments": [1]}')),
        ("hermes", answer("", "<tool_call>", '{"name": "f", "arguments": {"a": "\\ud800"}}')),
        ("hermes", answer("", "<tool_call>", "[" * 100_000)),
        ("hermes", answer("", "</tool_call>", "")),
        ("llama3", answer('{"name": "f", "parameters": {"a": 1}} and more')),
        ("llama3", answer("", "<|python_tag|>", "f.call(x)")),
        ("llama3", answer("", "<|python_tag|>", "f.call(a={1, 2})")),
        ("llama3", answer("", "<|python_tag|>", "f.call(a={(1, 2): b'3'})")),
        ("llama3", answer("", "<|python_tag|>", "1", "<|python_tag|>", "2")),
        ("mistral", answer("", "[TOOL_CALLS]", "f")),
        ("mistral", answer("So. ", "[TOOL_CALLS]", "")),
        ("mistral", answer("", "[TOOL_CALLS]", "f", "[TOOL_CALLS]", "g", "[ARGS]", "{}")),
        ("mistral", answer("", "[CALL_ID]", "abc")),
        ("mistral", answer("", "[ARGS]", "{}")),
        ("internlm2", answer("", "<|action_start|>", "")),
        ("internlm2", answer("So.", "<|action_end|>", "")),
        ("internlm2", answer("", "<|action_start|>", "", "<|plugin|>", '{"name": "f"}')),
        ("deepseek", answer("", DEEPSEEK["call▁begin"], "function", DEEPSEEK["call▁end"], "")),
        ("deepseek", answer("So.", DEEPSEEK["calls▁begin"], "f", DEEPSEEK["calls▁end"], "")),
        ("deepseek", answer("", DEEPSEEK["call▁begin"], "", DEEPSEEK["sep"], "{}")),
        ("code_block", answer("```python\nprint(1)")),
    ],
)
def test_a_broken_call_stays_words_and_is_said(form: ToolFormat, segments: list[Segment]) -> None:
    read = read_answer(form, segments)
    assert (read.words, read.calls) == ("".join(s.mark + s.text for s in segments), ())
    assert read.problem.startswith("a call cannot be read: ")


def test_the_format_is_that_of_the_template() -> None:
    found = {family: format_of(template_text(family)) for family in (*FORMATS, "glm4moe", "qwen3_5_think", "gemma")}
    # DeepSeek's template lists no tools, so that calls are written and read, and prompts may not name any.
    assert found == {**FORMATS, "glm4moe": None, "qwen3_5_think": None, "gemma": None}
    offered = {family: tool_prompts(family).tool_format for family in FORMATS}
    assert offered == {**FORMATS, "deepseekv3": None}


def test_marks_without_a_token_are_found_in_the_text_and_others_only_as_tokens() -> None:
    text = 'So. <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read_answer("hermes", [Segment("", text)], text_marks=marks_of("hermes")).calls
    assert read_answer("hermes", [Segment("", text)]).words == text


@pytest.mark.parametrize("role", ["tool", "environment"])
def test_roles_of_results_are_those_of_the_template(role: str) -> None:
    result = {"role": role, "name": "interpreter", "content": "4"}
    messages = [{"role": "user", "content": "2 + 2"}, called("python", {"code": "2 + 2"}), result]
    written = {
        family: ChatTemplate.of(tool_tokenizer(family)).render(messages, [TOOL]) for family in ("qwen2_5", "internlm2")
    }
    assert "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>" in written["qwen2_5"]
    assert "<|im_start|>environment name=<|interpreter|>\n4<|im_end|>" in written["internlm2"]
    assert "<|action_start|><|interpreter|>\n```python\n2 + 2\n```<|action_end|><|im_end|>" in written["internlm2"]
    own = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {})
    assert own.render([result]) == f"<{role}>4"


def test_what_a_template_leaves_out_is_named() -> None:
    question = {"role": "user", "content": "Hi"}
    result = {"role": "tool", "content": "4"}
    whole = [question, called("look_up", {}), result]
    silent = ChatTemplate("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", {})
    assert silent.find_unwritten([question], None) is None
    assert silent.find_unwritten([question], [TOOL]) == "tools[0]"
    assert silent.find_unwritten(whole[:2], None) == "messages[1].tool_calls[0]"
    assert silent.find_unwritten([question, result], None) == "messages[1].content"
    plain = ChatTemplate(ChatTemplate.built_in(PLAIN), {})
    assert plain.find_unwritten(whole, None) is None
    assert plain.find_unwritten(whole, [TOOL]) == "tools[0]"
    for family in FORMATS:
        tools = None if family == "deepseekv3" else [TOOL]
        assert ChatTemplate.of(tool_tokenizer(family)).find_unwritten(whole, tools) is None
