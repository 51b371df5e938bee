"""EMKF-Bandit: linear bandits with a hidden, temporally correlated context (Zeng et al., arXiv 2409.11521).

`math` chooses arms, starts and orders, `learner` holds what the streams have learned, `module` is the policy that is served, `method` the
algorithm, `experiment` its claims.
"""
