"""Everything around a training program: members, results, statistics, figures, logs."""
