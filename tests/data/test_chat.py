"""Chat templates: a row is what the template writes for question and answer, or it is refused."""

import pytest
from helpers.tiny import tiny_tokenizer

from floe.data.rows import encode, encode_choices, encode_questions, stop_tokens
from floe.errors import DataError

ROW = {"prompt": "ask ", "completion": " yes\n", "choices": [" yes\n", "no"], "answer": 0}
EACH = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
OPEN = "{{ '<u>' if m['role'] == 'user' else '<a>' }}"
PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
PARTS += "{% endif %}{% endfor %}"
TEMPLATES = {
    "plain": EACH + OPEN + "{{ m['content'] }}<e>" + ASK,
    "trimmed": EACH + OPEN + "{{ m['content'] | trim }}<e>\n" + ASK,
    "parts": EACH + OPEN + PARTS + "<e>" + ASK,
    "parts alone": EACH
    + "{% if m['content'] is string %}{{ raise_exception('no') }}{% endif %}"
    + OPEN
    + PARTS
    + "<e>"
    + ASK,
    "system": "<s>be brief<e>" + EACH + OPEN + "{{ m['content'] }}<e>" + ASK,
    "bos": "{{ bos_token }}" + EACH + OPEN + "{{ m['content'] }}<e>" + ASK,
    "thoughts put in": EACH
    + OPEN
    + "{% if m['role'] != 'user' %}[think]\n\n[/think]\n\n{% endif %}{{ m['content'] }}<e>\n"
    + ASK,
    "never asks": EACH + OPEN + "{{ m['content'] }}<e>{% endfor %}",
    "blank before": EACH + "{% if m['role'] == 'user' %}<u>{{ m['content'] }}<a>"
    "{% else %} {{ m['content'] }}<e>{% endif %}{% endfor %}",
    "other end": EACH + OPEN + "{{ m['content'] }}<s>" + ASK,
    "text end": EACH + OPEN + "{{ m['content'] }}\n\n" + ASK,
}


def tokenizer_with(template, bos=True):
    tokenizer = tiny_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def conversation(tokenizer, row, parts=False):
    texts = (("user", row["prompt"]), ("assistant", row["completion"]))
    content = (lambda text: [{"type": "text", "text": text}]) if parts else str
    turns = [{"role": role, "content": content(text)} for role, text in texts]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_row_is_what_the_template_writes(kind):
    tokenizer = tokenizer_with(TEMPLATES[kind])
    row = encode([ROW], tokenizer, template="chat").rows[0]
    whole = conversation(tokenizer, ROW, "parts" in kind)
    stop = "" if "<e>" in whole.partition("yes")[2] else "<e>"  # eos where the template has none
    assert tokenizer.decode(row.prompt + row.response) == whole + stop
    assert row.prompt + row.response == tuple(
        tokenizer(whole + stop, add_special_tokens=False)["input_ids"]
    )
    assert row.response.count(0) == 1
    opening, answer = tokenizer.decode(row.prompt), tokenizer.decode(row.response)
    assert answer.strip().startswith("yes")
    assert opening.endswith(("<a>", "[/think]\n\n"))
    assert (kind == "thoughts put in") == ("think" in opening)  # what the model need not learn
    assert row.labels == (-100,) * len(row.prompt) + row.response

    # Questions and choices come after the same tokens, choices without an end.
    assert encode_questions([ROW], tokenizer, template="chat").rows[0].prompt == row.prompt
    yes, no = encode_choices([ROW], tokenizer, template="chat").rows
    assert yes.prompt == no.prompt == row.prompt
    assert tokenizer.decode(yes.response).strip() == "yes"
    assert yes.response == row.response[: len(yes.response)]
    assert tokenizer.decode(no.response).strip() == "no"


def test_a_bos_that_the_template_writes_is_the_only_one_and_stays():
    tokenizer = tokenizer_with(TEMPLATES["bos"])
    row = {"prompt": "0123456789", "completion": "yes"}
    whole = encode([row], tokenizer, template="chat").rows[0]
    assert whole.prompt.count(1) == 1
    cut = encode([row], tokenizer, template="chat", max_length=10)
    assert cut.cut == [0]
    assert cut.rows[0].prompt == (1, *whole.prompt[-5:])
    assert cut.rows[0].response == whole.response


def test_the_end_of_a_turn_stops_an_answer():
    ends = {kind: stop_tokens(tokenizer_with(t), "chat") for kind, t in TEMPLATES.items()}
    assert ends.pop("other end") == [0, 1]
    assert all(stops == [0] for stops in ends.values())  # none where the end is ordinary text
    assert stop_tokens(tiny_tokenizer()) == [0]
    lacking = tokenizer_with(TEMPLATES["other end"])
    lacking.eos_token = None
    assert stop_tokens(lacking, "chat") == [1]
    assert encode([ROW], lacking, template="chat").rows[0].response[-1] == 1
    lacking.chat_template = TEMPLATES["text end"]
    with pytest.raises(DataError, match="row 0: tokenizer must have an eos token"):
        encode([ROW], lacking, template="chat")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the row: roles must alternate"),
        ("{{ 1 // 0 }}", "refuses the row: .*zero"),
        (EACH + "{{ m['content'].nothing.deeper }}" + ASK, "refuses the row"),
        ("<u>" + EACH + "<e>" + ASK, "must write the answer, it leaves it out"),
        (EACH + OPEN + "{{ m['content'] if m['role'] != 'user' }}<e>" + ASK, "the prompt as it is"),
        (
            EACH
            + OPEN
            + "{{ m['content'][:2] if m['role'] == 'user' else m['content'] }}<e>"
            + ASK,
            "must write the prompt as it is",
        ),
        (EACH + OPEN + "{{ m['content'].split(';')[-1] }}<e>" + ASK, "answer as it is, it changes"),
        (
            EACH
            + "{% if ';' in m['content'] %}!{% endif %}"
            + OPEN
            + "{{ m['content'] }}<e>"
            + ASK,
            "must open and end every answer alike",
        ),
        (EACH + "<u>{{ m['content'] }}<e>" + ASK, "must open an answer as its generation prompt"),
        (
            TEMPLATES["plain"].replace("{% endif %}", "[think]\n{% endif %}"),
            r"must open .* got '<u>ask <e><a>\[think\]\\n' to ask and",
        ),
    ],
)
def test_what_a_template_does_to_a_row_is_checked(template, message):
    """Training, choices and questions all name the row."""
    tokenizer, odd = tokenizer_with(template), {**ROW, "completion": "oh; yes"}
    rows = {4: {**odd, "choices": ["oh; yes", "no"]}}
    for encoding in (encode, encode_choices):
        with pytest.raises(DataError, match=f"train, row 4: .*{message}"):
            encoding(rows, tokenizer, template="chat", source="train")
    if "answer" not in message or "generation" in message:
        with pytest.raises(DataError, match=f"train, row 4: .*{message}"):
            encode_questions(rows, tokenizer, template="chat", source="train")


def test_rows_do_not_change_overnight():
    dated = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'never' }}"
    row = encode([ROW], tokenizer_with(dated + TEMPLATES["plain"]), template="chat").rows[0]
    assert tiny_tokenizer().decode(row.prompt) == "26 Jul 2024<u>ask <e><a>"


@pytest.mark.parametrize("template", [None, "chat", "Q {prompt}"])
@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_a_lone_surrogate_is_refused_by_row(template, field):
    tokenizer = tokenizer_with(TEMPLATES["plain"])
    rows = [ROW, {**ROW, field: "nice \ud83d", "choices": ["a", "\udc00"]}]
    with pytest.raises(DataError, match=r"row 1: .*lone surrogate '\\ud83d' at character"):
        encode(rows, tokenizer, template=template)
    with pytest.raises(DataError, match=r"row 1: .*lone surrogate"):
        encode_choices(rows, tokenizer, template=template)
