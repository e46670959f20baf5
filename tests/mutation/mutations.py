"""The mutations that `mutate.py` tries: what is broken, why that matters, which tests must see it.

A text that no longer occurs exactly once fails `tests/unit/test_mutations.py`: change the mutation
together with the code.  Choose small tests: every mutation runs its own from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

AREAS = ("solver", "estimator", "packer", "lease")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One deliberate mistake."""

    area: str
    name: str
    file: str
    old: str
    new: str
    why: str
    """What a user would get."""
    tests: tuple[str, ...]
    """Files or single tests, at least one of which must fail."""

    def apply(self, text: str) -> str:
        """The text with the mistake in it.

        Raises:
            ValueError: the place does not occur exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: expected the text of mutation {self.name!r} exactly once, found it "
                f"{text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


_EXPLAIN = "tests/unit/test_solve_explain.py::"
_OPTIMUM = "tests/unit/test_solve_optimum.py::"
_TIES = "tests/unit/test_solve_ties.py::"
_INFEASIBLE = "tests/unit/test_solve_infeasible.py::"
_SOLVE = "system/solve/"
_ESTIMATE = "system/influence/estimate/"
_INFLUENCE = "tests/unit/test_influence.py::"
_TRAIN = "tests/unit/test_train.py::"
_MICROBATCH = "tests/unit/test_microbatch.py"
_RUNDIR = "tests/unit/test_rundir.py"
_LEASE_TESTS = "tests/unit/test_lease.py"
_COMMIT = "tests/unit/test_commit.py"


def _mutation(
    area: str, name: str, file: str, old: str, new: str, why: str, *tests: str
) -> Mutation:
    return Mutation(area=area, name=name, file=file, old=old, new=new, why=why, tests=tests)


_SOLVER = (
    _mutation(
        "solver", "sign of the duals", _SOLVE + "program.py",
        "else solution.dual_R * self._cost_scale", "else -solution.dual_R * self._cost_scale",
        "every shadow price of a row has the wrong sign",
        _EXPLAIN + "test_prices_equal_the_difference_quotient_where_the_optimum_is_not_degenerate",
    ),
    _mutation(
        "solver", "sign of a guard's price", _SOLVE + "explain.py",
        "max(-dual, 0.0)", "max(dual, 0.0)",
        "guards that bind have no price",
        _EXPLAIN + "test_prices_equal_the_difference_quotient_where_the_optimum_is_not_degenerate",
    ),
    _mutation(
        "solver", "sign of reduced costs", _SOLVE + "program.py",
        "return solution.reduced_cost_C * self._cost_scale",
        "return -solution.reduced_cost_C * self._cost_scale",
        "supplies at their limit cost instead of bring",
        _EXPLAIN + "test_supply_price_counts_every_epoch",
    ),
    _mutation(
        "solver", "guard left out", _SOLVE + "row_generation.py",
        "has_floor_T = np.isfinite(self.floor_T)\n        if not",
        "has_floor_T = np.isfinite(self.floor_T)\n        has_floor_T[-1] = False\n        if not",
        "one target may lose whatever the mix takes from it",
        _OPTIMUM + "test_gain_equals_scipys_or_both_find_nothing",
    ),
    _mutation(
        "solver", "guard twice as wide", _SOLVE + "model.py",
        "guard_T = options.guard * np.abs(base_effect_T)",
        "guard_T = 2.0 * options.guard * np.abs(base_effect_T)",
        "targets lose twice what the user allowed",
        _INFEASIBLE + "test_guard_against_group_minimum_offers_both",
    ),
    _mutation(
        "solver", "trust region twice as wide", _SOLVE + "model.py",
        "move_budget=options.move * budget,", "move_budget=2.0 * options.move * budget,",
        "the mix moves further than it may",
        _OPTIMUM + "test_hand_solved_three_categories",
    ),
    _mutation(
        "solver", "tie goes to the largest move", _SOLVE + "tiebreak.py",
        "cost_C=-length_C[free],", "cost_C=length_C[free],",
        "of equal mixes the one furthest from the base is taken",
        _TIES + "test_of_equal_mixes_the_one_that_moves_least_is_taken",
    ),
    _mutation(
        "solver", "tie not spread", _SOLVE + "tiebreak.py",
        "if not second.is_unique:", "if False:",
        "equal categories are treated unequally",
        _TIES + "test_ties_take_the_least_move_then_spread_it",
    ),
    _mutation(
        "solver", "robust slope of removal", _SOLVE + "effects.py",
        "self.remove_TS = self.nominal_remove_TS + off_remove_TS",
        "self.remove_TS = self.nominal_remove_TS - off_remove_TS",
        "removing data looks cheaper the less is known about it",
        _OPTIMUM + "test_robust_stays_put_when_no_move_pays_for_its_error",
    ),
    _mutation(
        "solver", "robust against one source only", _SOLVE + "objectives.py",
        "-model.effects.sources_off, np.full(S, -1.0)", "-1.0, np.full(S, -1.0)",
        "the budget of uncertainty is not the configured one",
        _OPTIMUM + "test_budget_of_uncertainty_equals_all_worst_cases_written_out",
    ),
    _mutation(
        "solver", "counts not whole", _SOLVE + "model.py",
        "is_integer_C = np.r_[np.ones(2 * S, bool),", "is_integer_C = np.r_[np.zeros(2 * S, bool),",
        "a mix of whole examples has fractions",
        _OPTIMUM + "test_whole_mix_is_the_best_of_all_whole_mixes",
    ),
    _mutation(
        "solver", "one category too many", _SOLVE + "whole.py",
        "np.r_[-model.base_S, float(limit)],", "np.r_[-model.base_S, float(limit) + 1.0],",
        "max_categories is exceeded by one",
        _OPTIMUM + "test_category_limit_is_the_best_choice_of_categories",
    ),
    _mutation(
        "solver", "max-min lifts the worst only", _SOLVE + "objectives.py",
        "if not active or optimal_face(program, point, num_pairs=num_pairs(model)).is_unique:",
        "if True:",
        "targets above the worst one stay where they are",
        _OPTIMUM + "test_max_min_lifts_the_worst_then_the_next",
    ),
    _mutation(
        "solver", "slopes that cross are not pooled", _SOLVE + "effects.py",
        "crossed_TS = add_TS > remove_TS", "crossed_TS = add_TS > remove_TS + np.inf",
        "adding and removing the same data pays",
        _OPTIMUM + "test_concave_never_adds_and_removes_at_once_even_when_the_table_says_so",
    ),
    _mutation(
        "solver", "epochs forgotten", _SOLVE + "model.py",
        "else problem.supply_S * options.max_epochs", "else problem.supply_S",
        "data may be repeated less often than configured",
        _EXPLAIN + "test_supply_price_counts_every_epoch",
    ),
    _mutation(
        "solver", "effects that are not identifiable count", _SOLVE + "effects.py",
        "return np.where(mask_TS, matrix_TS, 0.0)", "return matrix_TS",
        "the mix follows effects that were not measured well enough",
        _OPTIMUM
        + "test_unidentifiable_effects_count_as_zero_and_still_cost_their_error_when_robust",
    ),
    _mutation(
        "solver", "largest remainders upside down", _SOLVE + "basemix.py",
        "order = np.argsort(-(base_S - whole_S), kind=\"stable\")",
        "order = np.argsort(base_S - whole_S, kind=\"stable\")",
        "the base of whole counts is not the nearest one",
        "tests/unit/test_base_mix.py",
    ),
)  # fmt: skip

_ESTIMATOR = (
    _mutation(
        "estimator", "sign of the paired difference", _ESTIMATE + "measurements.py",
        "return sign_S[:, None] * (reference_N - loss_SN)",
        "return sign_S[:, None] * (loss_SN - reference_N)",
        "data that helps looks harmful", "tests/unit/test_measurements.py",
    ),
    _mutation(
        "estimator", "removal has the sign of addition", _ESTIMATE + "measurements.py",
        "sign = 1.0 if direction == \"add\" else -1.0", "sign = 1.0",
        "the two directions contradict each other", "tests/unit/test_measurements.py",
    ),
    _mutation(
        "estimator", "doses of replications not aligned", _ESTIMATE + "measurements.py",
        "scale_S = dose_S / dose_RS[replication]", "scale_S = np.ones_like(dose_S)",
        "a smaller dose looks like a smaller effect", "tests/unit/test_measurements.py",
    ),
    _mutation(
        "estimator", "dose division left out", _ESTIMATE + "matrix.py",
        "replicate_RTS = measured.mean_RTS / dose_S", "replicate_RTS = measured.mean_RTS * 1.0",
        "effects are per dose, not per example", _INFLUENCE + "test_effects_converge_to_the_truth",
    ),
    _mutation(
        "estimator", "variance divided by the dose once", _ESTIMATE + "matrix.py",
        "variance_TS = errors.variance_TS / dose_S**2", "variance_TS = errors.variance_TS / dose_S",
        "standard errors are too large by the root of the dose",
        _INFLUENCE + "test_intervals_cover_the_truth_at_the_nominal_rate",
    ),
    _mutation(
        "estimator", "one-sided quantile", _ESTIMATE + "matrix.py",
        "stats.t.ppf(0.5 + confidence / 2.0,", "stats.t.ppf(confidence,",
        "a 95 % interval covers 90 %",
        _INFLUENCE + "test_intervals_cover_the_truth_at_the_nominal_rate",
    ),
    _mutation(
        "estimator", "degrees of freedom of all replications", _ESTIMATE + "noise.py",
        "freedom = mean_RTS.shape[0] - 1", "freedom = mean_RTS.shape[0]",
        "noise is underestimated, by half with two replications",
        _INFLUENCE + "test_intervals_cover_the_truth_at_the_nominal_rate",
    ),
    _mutation(
        "estimator", "noise of the mean not divided by replications", _ESTIMATE + "noise.py",
        "_row_covariance(training, row, int(own_T[row])) / replications",
        "_row_covariance(training, row, int(own_T[row]))",
        "more replications do not make errors smaller",
        _INFLUENCE + "test_intervals_cover_the_truth_at_the_nominal_rate",
    ),
    _mutation(
        "estimator", "training noise counted as held-out sampling", _ESTIMATE + "noise.py",
        "between_SS = between_SS - interaction_SS / replications",
        "between_SS = between_SS - 0.0 * interaction_SS",
        "errors are too large",
        _INFLUENCE + "test_training_noise_of_examples_is_not_counted_as_held_out_sampling",
    ),
    _mutation(
        "estimator", "sign of Fieller's covariance", _ESTIMATE + "fieller.py",
        "b = numerator * denominator - square * covariance",
        "b = numerator * denominator + square * covariance",
        "gamma's interval lies beside the ratio", "tests/unit/test_fieller.py",
    ),
    _mutation(
        "estimator", "gamma without the shared reference", _ESTIMATE + "matrix.py",
        "errors.own_covariance_TS[row] / (dose_S * dose_S[own]),",
        "0.0 * errors.own_covariance_TS[row],",
        "gamma's interval ignores that both effects share a reference run",
        _INFLUENCE
        + "test_gamma_is_fiellers_interval_with_the_covariance_of_the_shared_reference",
    ),
    _mutation(
        "estimator", "weight of shrinkage inverted", _ESTIMATE + "shrinkage.py",
        "weight_K = entry / (entry + variance_K)", "weight_K = variance_K / (entry + variance_K)",
        "certain effects are pulled to the mean, uncertain ones kept",
        "tests/unit/test_shrinkage.py",
    ),
    _mutation(
        "estimator", "shrinkage without its limit", _ESTIMATE + "shrinkage.py",
        "limited_TS = np.clip(shrunk_TS, effect_TS - reach_TS, effect_TS + reach_TS)",
        "limited_TS = shrunk_TS.copy()",
        "a rare large effect is pulled down to the others", "tests/unit/test_shrinkage.py",
    ),
)  # fmt: skip

_PACKER = (
    _mutation(
        "packer", "label shift left out", "system/training/microbatch.py",
        "to_device(position[labels] - 1, device)", "to_device(position[labels], device)",
        "a token is predicted from itself", _MICROBATCH,
    ),
    _mutation(
        "packer", "first token of a row is a label", "system/training/microbatch.py",
        "is_label = plan.response_mask[source] & (within > 0)",
        "is_label = plan.response_mask[source]",
        "a row's first token is predicted from the row before it", _MICROBATCH,
    ),
    _mutation(
        "packer", "positions run on", "system/training/microbatch.py",
        "position_ids=spread(within, 0),", "position_ids=spread(np.arange(len(ids)), 0),",
        "rows of a pass have positions that they never have alone", _MICROBATCH,
    ),
    _mutation(
        "packer", "rows see their neighbours", "system/training/attention.py",
        "starts = np.concatenate([[0], np.cumsum(lengths)])\n    return Segments(",
        "lengths = np.array([lengths.sum()])\n    starts = np.array([0, lengths[0]])\n"
        "    return Segments(",
        "attention crosses the boundaries of segments",
        _TRAIN + "test_rows_do_not_see_their_neighbours_in_a_pass",
    ),
    _mutation(
        "packer", "attention sees the future", "system/training/attention.py",
        "is_causal=mask is None,", "is_causal=False,",
        "tokens are predicted from what follows them",
        "tests/unit/test_attention_windows.py",
    ),
    _mutation(
        "packer", "denominator of the first step", "system/training/train.py",
        "scale = 1.0 / float(self.plan.denominators[step])",
        "scale = 1.0 / float(self.plan.denominators[0])",
        "steps with few response tokens weigh too little",
        _TRAIN + "test_gradient_equals_the_row_by_row_definition",
    ),
    _mutation(
        "packer", "denominator counts prompts", "system/training/plan.py",
        "per_row * is_counted[stage.indices.to_numpy()], step_starts[:-1]",
        "np.diff(offsets) * is_counted[stage.indices.to_numpy()], step_starts[:-1]",
        "long prompts make a step's gradient smaller", "tests/unit/test_plan.py", _MICROBATCH,
    ),
    _mutation(
        "packer", "exact fit not used", "system/training/pack.py",
        "bisect.bisect_left(free, (length, -1))", "bisect.bisect_left(free, (length + 1, -1))",
        "sequences that a row would fill stay open", "tests/unit/test_pack.py",
    ),
    _mutation(
        "packer", "sequence overfull", "system/training/pack.py",
        "bisect.insort(free, (room - length, sequence))", "bisect.insort(free, (room, sequence))",
        "sequences hold more tokens than fit", "tests/unit/test_pack.py",
    ),
    _mutation(
        "packer", "target not taken off the softmax", "system/training/loss.py",
        "torch.full_like(picked, -1.0)", "torch.full_like(picked, -0.9)",
        "the gradient is not that of the loss",
        _TRAIN + "test_blockwise_head_loss_equals_autograd",
    ),
    _mutation(
        "packer", "slope of capped logits left out", "system/training/loss.py",
        "if slope is not None:", "if False:",
        "models that cap their logits train with a wrong gradient", "tests/unit/test_heads.py",
    ),
    _mutation(
        "packer", "exponent of large logits", "system/training/loss.py",
        "logits -= logits.amax(dim=1, keepdim=True)", "logits -= 0.0",
        "large logits overflow",
        _TRAIN + "test_loss_of_huge_logits_stays_finite",
    ),
)  # fmt: skip

_LEASE = (
    _mutation(
        "lease", "outputs not looked for", "actors/pipeline.py",
        "if not storage.is_whole(storage.join(context.attempt, output)):", "if False:",
        "a stage is committed before its outputs are written", _COMMIT,
    ),
    _mutation(
        "lease", "record of the stage before that of the attempt", "system/rundir.py",
        "storage.join(self.attempt_uri(folder, record.fingerprint), \"record.json\"), value\n"
        "        )\n"
        "        storage.write_json(storage.join(self.stage_uri(folder), \"record.json\"), value)",
        "storage.join(self.stage_uri(folder), \"record.json\"), value\n"
        "        )\n"
        "        storage.write_json(\n"
        "            storage.join(self.attempt_uri(folder, record.fingerprint), \"record.json\"),\n"
        "            value,\n"
        "        )",
        "a kill in between leaves a result that no later configuration can find again", _RUNDIR,
    ),
    _mutation(
        "lease", "lease ignored", "system/rundir.py",
        "if holder is not None and self._is_living(holder):", "if False:",
        "two drivers write in one run directory", _RUNDIR,
    ),
    _mutation(
        "lease", "race for the lease not seen", "system/rundir.py",
        "if not storage.create(self._epoch_uri(mine), data):",
        "storage.create(self._epoch_uri(mine), data)\n        if False:",
        "two drivers that start together both go on", _LEASE_TESTS,
    ),
    _mutation(
        "lease", "no heartbeat", "system/rundir.py",
        "                        return\n                    self._write_lease(mine)",
        "                        return",
        "a run of more than a minute loses its directory to another driver", _RUNDIR,
    ),
    _mutation(
        "lease", "old leases never end", "system/rundir.py",
        "if age > LEASE_SECONDS:", "if age > 1e9:",
        "after a crash on another host nobody can continue", _RUNDIR,
    ),
    _mutation(
        "lease", "dead drivers hold their lease", "system/rundir.py",
        "and not _is_alive(holder.pid):", "and False:",
        "after a kill the run cannot be continued at once", _RUNDIR,
    ),
    _mutation(
        "lease", "a lost lease is not seen", "system/rundir.py",
        "if self._held is not None and not self._has_lease(self._held):", "if False:",
        "a driver that was paused comes back and overwrites results", _LEASE_TESTS,
    ),
    _mutation(
        "lease", "commits of lost drivers count", "system/rundir.py",
        "return record if newest.commits.get(path) == self._digest(path) else None",
        "return record",
        "a commit after the lease was lost becomes the result", _LEASE_TESTS,
    ),
    _mutation(
        "lease", "redo keeps shared work", "system/rundir.py",
        "        storage.delete(shared_uri(self.attempt_uri(folder, attempt)))\n", "",
        "--redo measures nothing again", _RUNDIR,
    ),
    _mutation(
        "lease", "fingerprint without files", "actors/pipeline.py",
        "    inputs |= _without_secrets(flatten(\"file\", stage.identity(config)), config)\n", "",
        "changed input files do not repeat a stage", _COMMIT,
    ),
    _mutation(
        "lease", "fingerprint without the revision", "actors/pipeline.py",
        "{\"stage\": stage.name, \"revision\": stage.revision}", "{\"stage\": stage.name}",
        "results of old code are taken for those of the new", _COMMIT,
    ),
    _mutation(
        "lease", "fingerprint without earlier stages", "actors/pipeline.py",
        "        for name in stage.after\n    }\n    return inputs",
        "        for name in ()\n    }\n    return inputs",
        "a stage is not repeated when what it reads has changed", _COMMIT,
    ),
    _mutation(
        "lease", "fingerprint depends on the order of keys", "system/rundir.py",
        "json.dumps(inputs, sort_keys=True,", "json.dumps(inputs, sort_keys=False,",
        "the same configuration in another order is another run", _RUNDIR,
    ),
    _mutation(
        "lease", "half a file under its name", "system/disk.py",
        "    with _written(path) as (file, temporary):\n        yield file\n"
        "        _flush(file)\n        os.replace(temporary, path)",
        "    with _written(path) as (file, temporary):\n        os.replace(temporary, path)\n"
        "        yield file",
        "a write that failed leaves half a file under the name of a whole one",
        "tests/unit/test_storage.py",
    ),
)  # fmt: skip

MUTATIONS = _SOLVER + _ESTIMATOR + _PACKER + _LEASE
