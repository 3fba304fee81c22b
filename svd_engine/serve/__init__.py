"""An OpenAI-compatible server over `SteeredEngine.submit`; needs the extra `serve`."""
