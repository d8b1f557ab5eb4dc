"""Which loss, sampler or network is best for some data: a paired comparison of learners, with honest intervals."""
