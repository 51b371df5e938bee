"""Stackelberg congestion games: a leader's tolls or capacities, and users who re-route (Li et al., arXiv 2209.07618).

`math` looks ahead, `search` remembers, `learner` and `module` are RLlib's, `method` is the algorithm, `experiment` its claims.
"""
