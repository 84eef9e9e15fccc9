"""Language models over HTTP: a small server (`potstill serve`) and the client that teachers and policies ask through.

Both speak OpenAI's `/v1/completions` as vLLM does, so the client may also ask vLLM, and other clients this server.
"""
