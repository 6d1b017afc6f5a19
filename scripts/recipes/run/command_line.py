"""How scripts read their command lines: whole flags, in both spellings, and by the names of transformers' examples."""

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

from transformers import HfArgumentParser

from specattn import expand_home, tolerate_output

# Other names of flags, where a script has the flag and nothing of the other name. Most are those of transformers' examples.
ALIASES = {
    "--lambda": "--lambda_",
    "--seed": "--seeds",
    "--per_device_train_batch_size": "--train_batch_size",
    "--max_length": "--max_seq_length",
    "--task_name": "--tasks",
    "--text_column_name": "--text_column",
    "--image_column_name": "--image_column",
    "--label_column_name": "--label_column",
    "--max_eval_samples": "--max_validation_samples",
}
# Switches that are a value of a flag.
SWITCHES = {"--bf16": ("--mixed_precision", "bf16"), "--fp16": ("--mixed_precision", "fp16")}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")

# Flags of transformers' examples without a counterpart -> what there is instead.
INSTEAD = {
    "--num_train_epochs": "this script counts optimizer steps: --max_steps",
    "--config_name": "a new model's sizes are --hidden_size, --num_hidden_layers and the like",
    "--report_to": "this script has no trackers; its results are files in --output_dir",
    "--push_to_hub": "`specattn push FOLDER NAME` publishes what a script saved",
    "--hub_model_id": "`specattn push FOLDER NAME` publishes what a script saved",
    "--attn_implementation": "each model takes the attention that transformers chooses for it",
    "--trust_remote_code": "no code of a checkpoint or data set is run",
    "--do_train": "it trains without being told",
    "--do_eval": "it evaluates without being told",
    "--do_predict": "there are no test sets to predict",
    "--eval_strategy": "--eval_steps says how often",
    "--save_strategy": "--save_steps says how often",
    "--seeds": "one run has one --seed; scripts/sweep.py runs several",
    "--optim": "the optimizer is AdamW",
}
SUGGESTIONS = 3


def flag(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """A field of a dataclass that `ScriptParser` reads."""
    return field(default=default, metadata={"help": help} | ({} if choices is None else {"choices": list(choices)}))


class ScriptParser(HfArgumentParser):
    """An `HfArgumentParser` for a command line that a person types.

    Abbreviations are not accepted; an unknown flag ends the program with the nearest ones. `--output-dir` is `--output_dir`,
    and `ALIASES` are read as what they stand for. A file of arguments beside the script is not looked for.
    """

    def __init__(self, dataclass_types: Any, **settings: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, of the words that `args` stands for."""
        return super().parse_known_args(self.spelled_out(sys.argv[1:] if args is None else args), namespace)

    def parse_args_into_dataclasses(
        self,
        args: Any = None,
        return_remaining_strings: Any = False,
        look_for_args_file: Any = False,
        args_filename: Any = None,
        args_file_flag: Any = None,
    ) -> tuple[Any, ...]:
        """As the parent's; what is wrong ends the program with status 2."""
        tolerate_output()
        try:
            *parsed, rest = super().parse_args_into_dataclasses(
                args, True, look_for_args_file, args_filename, args_file_flag
            )
            if rest and not return_remaining_strings:
                raise ValueError(self.describe_unknown(rest))
        except ValueError as error:
            self.exit(2, f"{self.prog}: error: {error}\n")
        return (*parsed, rest) if return_remaining_strings else tuple(parsed)

    def spelled_out(self, words: Sequence[str]) -> list[str]:
        """Return the words of a command line with each flag by its own name, up to a `--`."""
        end = words.index("--") if "--" in words else len(words)
        given = expand_home(words[:end])
        found: list[str] = []
        while given:
            word = given.pop(0)
            name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            flag = self._own_name(name)
            following = "" if equals or not given else given[0]
            if flag == "--report_to" and (value or following) == "none":  # transformers' word for no trackers
                given = given[1:] if following else given
            elif flag in SWITCHES and self._takes(*SWITCHES[flag]):
                if following.lower() in (*TRUE, *FALSE):
                    value = given.pop(0)
                found += [] if value.lower() in FALSE else SWITCHES[flag]
            else:
                found.append(f"{flag}{equals}{value}")
        return [*found, *words[end:]]

    def _own_name(self, name: str) -> str:
        if not name.startswith("--") or name in self._option_string_actions:
            return name
        underscored = "--" + name[2:].replace("-", "_")
        if underscored in self._option_string_actions:
            return underscored
        alias = ALIASES.get(underscored)
        return alias if alias in self._option_string_actions else underscored if underscored in SWITCHES else name

    def _takes(self, flag: str, value: str) -> bool:
        action = self._option_string_actions.get(flag)
        return action is not None and value in (action.choices or ())

    def describe_unknown(self, words: Iterable[str]) -> str:
        """Say which words are not flags, and which flags are similar or do the same."""
        lines, behind_a_flag = [], False
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--"):
                underscored = "--" + name[2:].replace("-", "_")
                lines.append(f"{name} is not a flag of this script{self._way_out(underscored)}")
                behind_a_flag = True
            elif not behind_a_flag:  # otherwise the value of an unknown flag
                lines.append(f"{word!r} belongs to no flag")
        return "; ".join(lines) + ("" if lines[-1].endswith("?") else ".") + " --help lists all."

    def _way_out(self, name: str) -> str:
        instead = INSTEAD.get(name, "")
        mentioned = [word.strip(",:;") for word in instead.split() if word.startswith("--")]
        if instead and all(flag in self._option_string_actions for flag in mentioned):
            return f": {instead}"
        flags = [flag for flag in self._option_string_actions if flag.startswith("--") and "-" not in flag[2:]]
        near = [flag for flag in flags if flag.startswith(name)] or difflib.get_close_matches(name, flags, SUGGESTIONS)
        return f"; did you mean {' or '.join(near[:SUGGESTIONS])}?" if near else ""
