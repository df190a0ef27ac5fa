"""Tests that `make test` leaves to `make test-slow`, so that it takes eight minutes. Each is the beginning of a node's
name, or a whole one.
"""

from __future__ import annotations

VARIANTS = ("no-rope-scaling", "no-temperature", "nope-every-2nd", "no-chunks", "gqa-1", "gqa-3", "gqa-4", "7-experts",
            "16-experts")
"""Of ``support/herds.py``: the others differ more from each other. A model that nothing else captures takes seconds."""

REPEATED = (
    *(f"tests/e2e/test_parity.py::test_text_matches_transformers[{name}]" for name in VARIANTS),
    *(f"tests/export/targets/test_cuda.py::test_twins_give_the_logits_of_the_canonical_graph[{name}]"
      for name in VARIANTS),
    *(f"tests/export/passes/attention/test_paged.py::test_numbers[{name}-"
      for name in ("nope-every-2nd", "no-temperature", "no-chunks")),
    "tests/calibration/test_coverage.py::test_every_expert_is_shown_real_inputs[128]",
    "tests/calibration/test_coverage.py::test_more_tokens_than_there_are_means_all[128]",
    "tests/calibration/test_coverage.py::test_too_few_tokens_fail_or_warn[128]",
    "tests/cli/test_cli.py::test_signals_leave_nothing_behind[1]",
    "tests/cli/test_cli.py::test_signals_leave_nothing_behind[2]",
    "tests/export/passes/test_expert_ranges.py::test_ranges_add_up[2-",
    "tests/export/passes/test_expert_ranges.py::test_ranges_add_up[6-",
    "tests/export/passes/test_grouped_if.py::test_numbers[33-128-2]",
    "tests/export/targets/test_tensorrt_builder.py::test_every_fp8_product_of_a_decoder_is_one[LowerExpertsUnrolled]",
    "tests/export/targets/test_tensorrt_shards.py::test_each_rank_has_a_plan_with_its_collectives[ep=2]",
    "tests/export/targets/test_tensorrt_weights_as_inputs.py::test_one_small_plan_in_which_products_stay_fp8["
    "LowerExpertsUnrolled]",
    "tests/export/test_sharded_build.py::test_recipes_are_as_near_to_float32_as_the_single_engine[fp32-int8-ep=4]",
    "tests/export/test_sharded_build.py::test_recipes_are_as_near_to_float32_as_the_single_engine[fp8-float-",
    "tests/export/test_sharded_build.py::test_recipes_are_as_near_to_float32_as_the_single_engine[int4-float-tp=4]",
    "tests/export/test_sharded_build.py::test_text_has_the_logits_of_the_single_engine[tied-tp=2,ep=2,pp=2]",
    "tests/model/training/test_checkpoints.py::test_a_full_disk_or_a_kill_while_saving_keeps_what_was_there[full-1]",
    "tests/packaging/test_extras.py::test_missing_packages_are_one_line[cpu,build]",
    "tests/runtimes/distributed/test_nccl.py::test_a_rank_that_fails_is_told_by_the_others[tp=2,pp=2-",
    "tests/runtimes/distributed/test_nccl.py::test_a_rank_that_fails_is_told_by_the_others[tp=2-0:",
    "tests/runtimes/distributed/test_nccl.py::test_a_stopped_rank_is_named[tp=4]",
    "tests/runtimes/distributed/test_nccl.py::test_ranks_on_several_machines_meet_through_gloo[-33]",
    "tests/runtimes/distributed/test_sharded_transport.py::test_a_stopped_rank_is_named_after_the_timeout[gloo]",
    "tests/runtimes/distributed/test_sharded_transport.py::test_all_ranks_get_what_each_gave[3-gloo]",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_logits_of_the_cpu_engine[128-experts-",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_logits_of_the_cpu_engine[gqa-5-",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_logits_of_the_cpu_engine[no-chunks-",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_logits_of_the_cpu_engine[tied-",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_logits_of_the_cpu_engine[top-2-LowerExpertsUnrolled]",
)
"""Cases that prove again, in another arrangement, what a case of the same test proves in every run."""

LONG = (
    "tests/calibration/test_calibrate.py::test_a_generous_bound_keeps_nothing",
    "tests/cli/test_cli.py::test_what_the_caller_ignores_stays_ignored",
    "tests/cli/test_train.py::test_without_a_terminal_progress_is_lines",
    "tests/export/graph/test_capture.py::test_experts_do_not_grow_the_graph",
    "tests/export/targets/test_tensorrt_builder.py::test_the_same_model_gives_the_same_plan",
    "tests/export/test_sharded_build.py::test_tied_and_rotated",
    "tests/model/training/test_fp8.py::test_fp8_learns_as_bfloat16_does",
    "tests/packaging/test_native_wheel.py::test_a_target_asked_for_by_name_is_not_left_out",
    "tests/packaging/test_native_wheel.py::test_editable_install_compiles_only_what_is_outdated",
    "tests/runtimes/executors/test_tensorrt_runner.py::test_a_context_shorter_than_a_chunk",
)
"""Tests of several seconds that nothing in `make test` stands for."""

LESS_TELLING = REPEATED + LONG
