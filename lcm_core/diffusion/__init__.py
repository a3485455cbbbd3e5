"""The mathematics: noise schedules, processes, consistency functions, guidance, solvers, samplers. torch alone."""
