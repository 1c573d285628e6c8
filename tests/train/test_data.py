"""Training rows: token masks, bad rows, packing and the order of steps."""

import json

import numpy as np
import pytest

from draftsmith.models.errors import UserError
from draftsmith.models.rendering import Renderer
from draftsmith.train import data
from draftsmith.train.schedule import Schedule, epoch_steps, held_out, rate_scale


def read(files, tokenizer, folder, max_length=64, max_bad_rows=0.0, report=print):
    return data.prepare([str(f) for f in files], max_length, max_bad_rows, tokenizer, {2}, 300, folder / "rows", report)


def encode_row(tokenizer, messages, stops):
    ((ids, mask),) = Renderer(tokenizer).encode(messages, None, stops).rows
    return ids, mask


def as_lists(rows):
    return [(tokens.tolist(), mask.astype(int).tolist()) for tokens, mask in map(rows.row, range(len(rows)))]


def test_answer_mask_with_and_without_generation_blocks(tokenizer):
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "return"},
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": "os"},
    ]
    ids, mask = encode_row(tokenizer, messages, {2})
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "return<|end|>os<|end|>"
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = kept.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert encode_row(tokenizer, messages, {2}) == (ids, mask)
        prompt = Renderer(tokenizer).prompt(messages[:1])
        assert ids[: len(prompt)] == prompt
    finally:
        tokenizer.chat_template = kept


def test_rows_as_regenerate_writes_them_plain_text_and_conversations(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    answer = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return"}]
    records = [
        {"tokens": [1, 3, 9, 8, 7], "prompt_length": 2},
        {"text": "import os"},
        {"messages": answer},
        {"conversations": [{"from": "human", "value": "add"}, {"from": "gpt", "value": "return"}]},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = read([file], tokenizer, tmp_path)
    listed = as_lists(rows)
    assert (
        listed[0] == ([1, 3, 9, 8, 7], [0, 0, 1, 1, 1])
        and tokenizer.decode(listed[1][0]) == "import os"
        and all(listed[1][1])
    )
    assert listed[2] == listed[3] == tuple(map(list, encode_row(tokenizer, answer, {2})))
    assert rows.prompt(0) == [1, 3] and rows.counts[7] >= 1 and rows.counts.sum() == sum(sum(m) for _, m in listed)
    assert as_lists(read([file], tokenizer, tmp_path, max_length=4))[0] == ([1, 3, 9, 8], [0, 0, 1, 1])


def test_parquet_and_json_rows_equal_jsonl_rows(folder, tmp_path, tokenizer):
    import datasets

    records = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps(records))
    want = as_lists(read([folder / "rows.jsonl"], tokenizer, tmp_path / "a"))
    assert len(want) == 24
    for name in ("rows.parquet", "rows.json"):
        assert as_lists(read([tmp_path / name], tokenizer, tmp_path / name.replace(".", "-"))) == want


def test_rows_are_encoded_once_and_again_when_anything_changes(folder, tmp_path, tokenizer):
    said = []
    first = read([folder / "rows.jsonl"], tokenizer, tmp_path, report=said.append)
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    assert (
        read([folder / "rows.jsonl"], tokenizer, tmp_path).folder == first.folder
        and (first.folder / "tokens.bin").stat().st_mtime_ns == stamp
    )
    assert read([folder / "rows.jsonl"], tokenizer, tmp_path, max_length=32).key != first.key
    assert read([folder / "rows.jsonl", folder / "rows.jsonl"], tokenizer, tmp_path).key != first.key


@pytest.mark.parametrize(
    ("said", "kept"),
    [([0, 0.8, 0.0], [0.0, 0.8]), ([0.8, None], [0.8, None]), (["hot", True], [None])],
    ids=["as regenerate writes them", "some do not say", "no numbers"],
)
def test_the_temperatures_of_the_answers_are_kept(tmp_path, tokenizer, said, kept):
    file = tmp_path / "rows.jsonl"
    row = {"tokens": [1, 3, 9, 8, 7], "prompt_length": 2}
    lines = [json.dumps(row | ({} if t is None else {"temperature": t})) for t in said]
    lines.append(json.dumps(row | {"prompt_length": 5, "temperature": 0.5}))  # nothing to learn from: left out
    file.write_text("\n".join(lines))
    rows = read([file], tokenizer, tmp_path)
    assert len(rows) == len(said) and rows.temperatures == kept
    (rows.folder / "temperatures.json").unlink()  # as rows were prepared before
    assert data.Rows(rows.folder).temperatures is None


def test_the_laws_of_the_answers_are_kept(tmp_path, tokenizer):
    """Each once, as `draftsmith regenerate` writes it; what is no law counts as not said."""
    law, other = {"top_k": 0, "top_p": 1.0}, {"top_k": 20, "top_p": 0.9}
    for said, kept in (
        ([law, law], [law]),
        ([law, other, None], [law, other, None]),
        (["greedy", {"top_k": "x"}], [None]),
    ):
        file = tmp_path / "rows.jsonl"
        row = {"tokens": [1, 3, 9, 8, 7], "prompt_length": 2}
        file.write_text("\n".join(json.dumps(row | ({} if found is None else {"sampling": found})) for found in said))
        rows = read([file], tokenizer, tmp_path)
        assert rows.laws == sorted(kept, key=lambda found: json.dumps(found, sort_keys=True))
    (rows.folder / "laws.json").unlink()
    assert data.Rows(rows.folder).laws is None


def test_a_few_bad_rows_are_counted_and_reported_and_many_refused(folder, tmp_path, tokenizer):
    lines, file, said = (folder / "rows.jsonl").read_text().splitlines(), tmp_path / "rows.jsonl", []
    lines[5], lines[9] = '{"messages": [', '{"messages": [{"role": "user", "content": "no answer"}]}'
    file.write_bytes("\n".join([*lines, ""]).encode() + b'{"text": "\xff"}\n')
    rows = read([file], tokenizer, tmp_path, max_bad_rows=0.2, report=said.append)
    assert (
        len(rows) == 22
        and "3 of 25 rows cannot be used and are left out; the first: " in said[0]
        and "row 6: not valid JSON" in said[0]
    )
    with pytest.raises(
        UserError,
        match=r"found 3 of 25 rows that cannot be used, expected at most 10.00% \(data.max_bad_rows\); "
        r"the first: .* row 6",
    ):
        read([file], tokenizer, tmp_path / "strict", max_bad_rows=0.1)
    assert not list((tmp_path / "strict" / "rows").iterdir())
    file.write_text("nonsense\n" * 5000)
    with pytest.raises(UserError, match="found 1000 of 1000 rows"):  # not read to its end
        read([file], tokenizer, tmp_path / "hopeless", max_bad_rows=0.1)


def test_steps_are_deterministic_fit_their_budget_and_use_every_row_at_most_once():
    lengths = np.array([n % 7 + 2 for n in range(200)])
    numbers = np.arange(10, 200)
    steps = epoch_steps(lengths, numbers, 20, 3, seed=1, epoch=3)
    assert (
        steps
        == epoch_steps(lengths, numbers, 20, 3, seed=1, epoch=3)
        != epoch_steps(lengths, numbers, 20, 3, seed=1, epoch=4)
    )
    flat = [row for step in steps for part in step for row in part]
    assert len(set(flat)) == len(flat) > 180 and set(flat) <= set(numbers.tolist())
    assert all(len(step) == 3 for step in steps) and all(sum(lengths[part]) <= 20 for step in steps for part in step)


def test_a_schedule_goes_on_from_any_step():
    lengths = np.array([n % 7 + 2 for n in range(200)])
    schedule = Schedule(lengths, np.arange(200), 20, 2, seed=0, epochs=2.5)
    whole = list(schedule.after(0))
    assert [n for n, _, _ in whole] == list(range(1, schedule.total + 1)) and {e for _, e, _ in whole} == {0, 1, 2}
    for done in (1, schedule.per_epoch[0], schedule.total - 1):
        assert list(schedule.after(done)) == whole[done:]


def test_held_out_rows_are_not_trained_on():
    alone = np.arange(50)
    train, kept = held_out(alone, 8, seed=3)
    assert (
        len(kept) == 8
        and sorted([*train, *kept]) == list(range(50))
        and held_out(alone, 8, seed=3)[1].tolist() == kept.tolist()
    )


def test_a_held_out_conversation_is_measured_once_and_none_of_its_rows_is_trained_on():
    conversations = np.repeat(np.arange(50), np.arange(50) % 3 + 1)
    train, kept = held_out(conversations, 8, seed=3)
    numbers, first = np.unique(conversations, return_index=True)
    assert (
        len(kept) == 8
        and set(kept) <= set(first)
        and np.array_equal(conversations[kept], held_out(numbers, 8, seed=3)[1])
    )
    assert np.array_equal(train, [row for row, number in enumerate(conversations) if number not in conversations[kept]])


def test_rates():
    scales = [rate_scale(s, 10, 0.2, "linear") for s in range(10)]
    assert scales[:2] == [0.5, 1.0] and scales[-1] == 1 / 8 and all(a > b for a, b in zip(scales[2:], scales[3:]))
    assert [rate_scale(s, 10, 0.2, "constant") for s in (0, 1, 9)] == [0.5, 1.0, 1.0]
    assert rate_scale(6, 10, 0.2, "cosine") == pytest.approx(0.5) and rate_scale(2, 10, 0.2, "cosine") == pytest.approx(
        1.0
    )
