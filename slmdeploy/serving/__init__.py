"""The HTTP server over one build: OpenAI's endpoints, scores, vectors and labels, limits, figures and a page to try it.

app.py puts the parts together, engine.py of the runtime computes, and nothing here knows how.
"""
