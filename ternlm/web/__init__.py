"""The chat page, and a client of servers with OpenAI's interface; nothing of ternlm is imported here, all is HTTP."""
