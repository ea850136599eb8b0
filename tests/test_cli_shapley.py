"""`neuropil shapley`: from CSV files to a page, its numbers those of the library, what is refused before the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from test_cli import run, said_no_traceback

from neuropil.errors import MissingExtra
from neuropil.interpret.shapley import ShapleyWorkflow

FAST = ("--models", "tree,logistic", "--selector-model", "logistic", "--search", 0, "--cv", 2)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tumours in two cohorts by their texture, and a table whose target is a number."""
    path = tmp_path_factory.mktemp("tables")
    frame = load_breast_cancer(as_frame=True).frame.iloc[:, [0, 1, 2, 3, 7, 27, -1]]
    frame = frame.assign(target=frame["target"].map({0: "malignant", 1: "benign"}))
    fine = frame["mean texture"] < 20
    frame[fine][:150].assign(subject=[i // 2 for i in range(150)]).to_csv(path / "train.csv", index=False)
    frame[~fine][:80].to_csv(path / "coarse.csv", index=False)
    load_diabetes(as_frame=True, scaled=False).frame[:80].to_csv(path / "diabetes.csv", index=False)
    return path


def test_the_numbers_are_those_of_the_library(tables: Path, tmp_path: Path) -> None:
    given = ["--target", "target", "--groups", "subject", "--drop", "mean area", "--external", tables / "coarse.csv"]
    done = run("shapley", tables / "train.csv", *given, *FAST, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    train, coarse = (pd.read_csv(tables / f"{name}.csv") for name in ("train", "coarse"))
    X = train.drop(columns=["target", "subject", "mean area"])
    workflow = ShapleyWorkflow(["tree", "logistic"], selector_model="logistic", search=0, cv=2)
    workflow.fit(X, train["target"].to_numpy(), train["subject"].to_numpy())
    workflow.evaluate({"coarse": (coarse, coarse["target"].to_numpy())}).explain()
    means = workflow.scores_.groupby("model")["balanced_accuracy"].mean()
    assert facts["best"] == workflow.best_
    assert {row["model"]: row["mean"] for row in facts["models"]} == pytest.approx(means.to_dict())
    judged = {row["model"]: row["balanced_accuracy"] for row in facts["cohorts"]}
    assert judged == pytest.approx(workflow.evaluation_.set_index("model")["balanced_accuracy"].to_dict())
    table = workflow.importances_[workflow.importances_["model"] == workflow.best_].set_index("column")
    for row in facts["importances"]:
        for kind in ("shapley", "natural", "permutation"):
            assert row[kind] == pytest.approx(table.loc[row["column"], kind])
    assert [row["shapley"] for row in facts["importances"]] == sorted(table["shapley"], reverse=True)
    assert {row["against"] for row in facts["agreement"]} == {"natural", "permutation"}
    assert facts["columns"] == list(X.columns)
    assert Path(facts["written"]).is_file()
    evaluated = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    assert set(evaluated["cohort"]) == {"coarse"}


def test_it_is_shown(tables: Path, tmp_path: Path) -> None:
    call = ("shapley", tables / "train.csv", "-t", "target", "--drop", "subject", *FAST, "-o", tmp_path, "--top", 2)
    done = run(*call, "--external", tables / "coarse.csv", "--correlated", 0.4)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "balanced", "accuracy", "p", "to", "best", "columns", "coarse"]
    assert {line.split()[0] for line in lines[1:3]} == {"tree", "logistic"}
    assert "on coarse" in lines[4]
    assert lines[5].split() == ["column", "mean", "|shapley|", "natural", "permutation"]
    assert lines[8] == ""  # two columns and no more
    assert lines[9].startswith("aspect")
    assert any(line.startswith("ranks of Shapley values  natural r = ") for line in lines)
    assert lines[-1].split() == ["page", str(tmp_path / "index.html")]
    assert "explanation …" in done.stderr


def test_numbers_are_predicted(tables: Path, tmp_path: Path) -> None:
    call = ("shapley", tables / "diabetes.csv", "-t", "target", "--task", "regression", "--models", "ridge")
    done = run(*call, "--search", 0, "--cv", 2, "-o", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["score"], facts["explained_on"], facts["cohorts"]) == ("r2", "training", [])
    frame = pd.read_csv(tables / "diabetes.csv")
    workflow = ShapleyWorkflow("ridge", task="regression", search=0, cv=2)
    workflow.fit(frame.drop(columns="target"), frame["target"].to_numpy())
    assert facts["models"][0]["mean"] == pytest.approx(workflow.scores_["r2"].mean())
    assert set(facts["models"][0]["columns"]) == set(workflow.selection_["column"])


CLASSES = "a,b,dx\n1,2,x\n2,1,y\n3,5,x\n4,4,y\n"


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({"t": CLASSES}, ["-t", "diagnosis"], "has no column 'diagnosis'; it has a, b, dx."),
        ({"t": CLASSES}, ["-t", "dx", "--drop", "c"], "has no column 'c'; it has a, b."),
        ({"t": CLASSES}, ["-t", "dx", "--groups", "c"], "has no column 'c'"),
        ({"t": "a,dx\n"}, ["-t", "dx"], "has no rows below its header"),
        ({"t": ""}, ["-t", "dx"], "is no CSV file (No columns to parse from file)"),
        ({"t": "a,dx\n1,x\n2\n"}, ["-t", "dx"], "1 row of"),
        ({"t": "a,dx\n1,0.5\n2,0.7\n3,0.5\n"}, ["-t", "dx"], "--task regression predicts it"),
        ({"t": CLASSES}, ["-t", "dx", "--task", "regression"], "'x', which is no number; --task classification"),
        ({"t": "a,dx\n1,x\n2,x\n3,y\n"}, ["-t", "dx"], "is 'y' in one row alone"),
        ({"t": CLASSES, "e": "a,dx\n1,x\n"}, ["-t", "dx"], "e.csv has no column 'b'; it has a."),
        ({"t": CLASSES, "e": "a,b\n1,2\n"}, ["-t", "dx"], "e.csv has no column 'dx'"),
        ({"t": CLASSES, "e": "a,b,dx\n1,2,z\n2,3,x\n"}, ["-t", "dx"], "has dx 'z', which the training table has not"),
        ({"t": CLASSES, "e": "a,b,dx\n900,2,x\n950,3,x\n"}, ["-t", "dx"], "seems to be in other units: a (median 2.5"),
        ({"t": CLASSES, "e": "a,b,dx\nlow,2,x\n"}, ["-t", "dx"], "column 'a' held numbers"),
        ({"t": CLASSES}, ["-t", "dx", "--models", "tree,mlp"], "got 'mlp'; there are xgboost, forest, svm, tree"),
        ({"t": CLASSES}, ["-t", "dx", "--selector-model", "ridge"], "got 'ridge'"),
        ({"t": CLASSES}, ["-t", "dx", "--models", ","], "give one or more of xgboost"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, str], options: list[str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    external = ["--external", tmp_path / "e.csv"] if "e" in files else []
    done = run("shapley", tmp_path / "t.csv", *options, *external, "--out", tmp_path / "out", env={"COLUMNS": "1000"})
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_what_only_the_library_sees_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,dx\n1,x\n2,x\n3,x\n")
    done = run("shapley", tmp_path / "t.csv", "-t", "dx", "--models", "tree")
    assert done.exit_code == 1
    assert "t.csv: one class, ['x']; a classifier needs at least two" in done.stderr.replace("\n", " ")


def test_a_missing_extra_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, tables: Path) -> None:
    monkeypatch.setitem(sys.modules, "shap", None)
    done = run("shapley", tables / "train.csv", "-t", "target", "--models", "tree")
    assert 'pip install "neuropil[shapley]"' in said_no_traceback(done, MissingExtra.exit_code)
