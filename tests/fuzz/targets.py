"""What is fed with damaged files, through the same code as the commands, up to where weights would be trained."""

from __future__ import annotations

from tests.fuzz import texts, weights
from tests.fuzz.commands import load_paddle, prepare_run
from tests.fuzz.runner import Target

TARGETS = (
    Target(name="argument files", num_cases=20_000, prepare=prepare_run, draw=texts.draw_argument_file, run=texts.run_argument_file, load=load_paddle),
    Target(name="data files", num_cases=10_000, prepare=prepare_run, draw=texts.draw_data_file, run=texts.run_data_file),
    Target(name="model folders", num_cases=2000, prepare=weights.prepare_models, draw=weights.draw_model_folder, run=weights.run_model_folder, load=load_paddle),
    Target(name="adapter folders", num_cases=500, prepare=weights.prepare_adapters, draw=weights.draw_adapter_folder, run=weights.run_adapter_folder, load=load_paddle),
    Target(name="checkpoints", num_cases=500, prepare=weights.prepare_checkpoints, draw=weights.draw_checkpoint, run=weights.run_checkpoint, load=load_paddle),
    Target(name="pickles", num_cases=200, prepare=weights.prepare_pickles, draw=weights.draw_pickle, run=weights.run_pickle),
    Target(name="templates", num_cases=100, prepare=prepare_run, draw=texts.draw_template, run=texts.run_template),
)  # fmt: skip
