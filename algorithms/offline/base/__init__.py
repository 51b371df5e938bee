"""What every offline gradient method shares.

`config` holds the settings and takes the data, `module` the networks with seeds side by side, `learner` draws rows and steps,
`method` is the algorithm: blocks of steps, scores in the environment of the data.

The data sit once per node in the object store.  An iteration is a block of gradient steps: each learner draws the indices of
the whole block at once, S seeds from S streams of their own, and gradients are averaged, so that L learners with batch b are
one learner with batch L b.  No environment is stepped but to evaluate.
"""
