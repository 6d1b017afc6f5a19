"""results.json: kept whole, merged by run, and refused where runs do not belong into one table."""

import dataclasses
import json
import threading

import pytest

from recipes.glue.glue_results import (
    Results,
    ResultsError,
    RunRecord,
    differing_settings,
    find_conflicts,
)


def record(model="stock", task="cola", seed=0, settings=None, data=None, **fields):
    settings = {"learning_rate": 4e-5, "targets": ("query", "key")} if settings is None else settings
    data = {"train_fingerprint": "abc"} if data is None else data
    return RunRecord(model, task, seed, settings, data, **fields)


def test_records_come_back_as_they_were(tmp_path):
    results = Results(tmp_path / "new" / "folder")
    assert results.read() == []
    first = record(
        scores={"validation": {"matthews_correlation": 0.5}},
        first_loss=0.7,
        epoch_losses=[0.6, 0.5],
        facts={"steps": 3},
        seconds={"total": 1.5},
        versions={"torch": "2"},
        outputs=["a/b"],
        settings={"learning_rate": 4e-5},
    )
    failed = record(seed=1, status="failed", failure={"kind": "diverged", "message": "nan"}, settings={})
    results.add(first)
    results.add(failed)
    assert results.read() == [first, failed]
    again = dataclasses.replace(first, first_loss=0.1)
    results.add(again)
    assert results.read() == [again, failed]


def add_some(directory, model):
    results = Results(directory)
    for seed in range(10):
        results.add(record(model=model, seed=seed))


def test_two_commands_may_write_into_one_folder(tmp_path):
    workers = [threading.Thread(target=add_some, args=(tmp_path, model)) for model in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found.key for found in Results(tmp_path).read()) == sorted(
        (model, "cola", seed) for model in ("a", "b") for seed in range(10)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged or not a record of GLUE runs"),
        ("[]", "is damaged or not a record of GLUE runs"),
        ('{"format": 1, "runs": [{"model": "a"}]}', "is damaged or not a record of GLUE runs"),
        ('{"format": 99, "runs": []}', "has the format 99; this version reads 1"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ResultsError, match=message):
        Results(tmp_path).read()


def test_unknown_tasks_are_refused(tmp_path):
    Results(tmp_path).add(record())
    content = json.loads((tmp_path / "results.json").read_text())
    content["runs"][0]["task"] = "imdb"
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="runs of unknown tasks: imdb"):
        Results(tmp_path).read()


def test_conflicts():
    def conflicts(**planned):
        return find_conflicts([record()], [record(**planned)])

    other_rate = {"learning_rate": 2e-5, "targets": ["query", "key"]}
    assert conflicts() == conflicts(seed=1) == conflicts(task="rte") == conflicts(model="svd") == []
    rate = "stock: learning_rate was 4e-05, and is 2e-05"
    assert conflicts(settings=other_rate) == conflicts(settings=other_rate, seed=3, task="rte") == [rate]
    assert conflicts(settings=other_rate, model="svd") == []
    other_data = {"train_fingerprint": "xyz", "max_train_samples": 5}
    lines = [
        "CoLA: max_train_samples was not recorded, and is 5",
        "CoLA: train_fingerprint was abc, and is xyz",
    ]
    assert conflicts(data=other_data) == conflicts(data=other_data, model="svd", seed=1) == lines
    assert conflicts(data=other_data, task="rte") == []


def test_tuples_equal_the_lists_that_json_makes_of_them(tmp_path):
    results = Results(tmp_path)
    results.add(record())
    assert find_conflicts(results.read(), [record()]) == []


def test_settings_in_which_models_differ():
    records = [
        record(model="a", settings={"rate": 1, "lora": None}),
        record(model="b", settings={"rate": 1, "lora": 8}),
        record(model="b", seed=1, settings={"rate": 1, "lora": 8}),
    ]
    assert differing_settings(records) == {"lora": {"a": None, "b": 8}}
    assert differing_settings(records[:1]) == {}
