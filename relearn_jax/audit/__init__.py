"""The experiment itself: arms, grid, statistics, verdict."""
