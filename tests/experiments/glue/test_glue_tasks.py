import pytest

from recipes.glue.tasks import COLUMNS, TASKS, parse_tasks


def test_the_columns_stand_as_in_the_paper_with_both_splits_of_mnli():
    titles = [column.title for column in COLUMNS]
    assert titles == ["MNLI-m", "MNLI-mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA"]
    assert [column.heading for column in COLUMNS][-3:] == ["QQP (F1)", "MRPC (F1)", "CoLA (Matthews)"]
    assert {column.heading for column in COLUMNS} >= {"MNLI-m (accuracy)", "STS-B (Pearson)", "RTE (accuracy)"}


def test_each_task_is_consistent():
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.labels) == len(task.label_names)
        assert len(task.hub_text_columns) == len(task.tsv_text_columns) in (1, 2)
        assert task.num_outputs == {"stsb": 1, "mnli": 3}.get(name, 2)
        assert task.is_regression == (name == "stsb")
        assert task.main_metric == {
            "cola": "matthews_correlation",
            "stsb": "pearson",
            "mrpc": "f1",
            "qqp": "f1",
        }.get(name, "accuracy")
        splits = [len(task.splits_of(kind)) for kind in ("train", "validation", "test")]
        assert splits == ([1, 2, 2] if name == "mnli" else [1, 1, 1])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("all", list(TASKS)),
        (["all"], list(TASKS)),
        ("rte", ["rte"]),
        ("cola,rte , SST2", ["cola", "rte", "sst2"]),
        (["cola,rte", "mnli"], ["cola", "rte", "mnli"]),
    ],
)
def test_parsing(names, expected):
    assert [task.name for task in parse_tasks(names)] == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cola,imdb", r"--tasks imdb: unknown; choose all, or some of mnli, sst2, .*, cola"),
        ("wnli", r"--tasks wnli: unknown.*WNLI, which is left out here as in BERT's"),
        ("rte,cola,rte", "--tasks rte,cola,rte: a task is named twice"),
        (" , ", "--tasks names no task"),
        ("all,rte", "--tasks all: unknown"),
    ],
)
def test_refusals(names, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(names)
