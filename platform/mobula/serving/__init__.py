"""The service: trained policies, mechanisms, planners and language models behind one address.

`services` has the protocols that later planners and models plug into, `gateway` the routes, `app` their deployment with Ray Serve.
"""
