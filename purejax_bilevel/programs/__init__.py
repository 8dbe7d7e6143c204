"""What is trained: a folder for each family of training programs."""

# Name in sweep files -> module with the program's `Config`, imported when it is used. A new family adds a line here;
# `train_rl` finds its agents by their names.
REGISTRY = {
    "rl": "purejax_bilevel.programs.control.q_learning",
    "continuous": "purejax_bilevel.programs.control.soft_actor_critic",
    "regression": "purejax_bilevel.programs.regression.program",
    "tabular": "purejax_bilevel.programs.tabular.program",
    "ppo": "purejax_bilevel.programs.learned_optimizers.program",
    "open_training": "purejax_bilevel.programs.learned_optimizers.meta_training",
    "collect": "purejax_bilevel.programs.offline.collect",
    "ensemble": "purejax_bilevel.programs.offline.ensemble_program",
    "meta_objectives": "purejax_bilevel.programs.meta_objectives.program",
    "meta_test": "purejax_bilevel.programs.meta_objectives.meta_test",
    "offline": "purejax_bilevel.programs.offline.program",
    "mbpo": "purejax_bilevel.programs.offline.online",
    "observatory": "purejax_bilevel.programs.observatory.control",
    "observatory_tabular": "purejax_bilevel.programs.observatory.tabular",
    "observatory_regression": "purejax_bilevel.programs.observatory.regression",
}
