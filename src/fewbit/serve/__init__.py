"""An HTTP server over `fewbit.runtime.engine.Engine` that speaks OpenAI's protocol, with a chat page at `/`."""
