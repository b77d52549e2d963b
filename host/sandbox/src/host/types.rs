//! Conversions of the shared plain data between `wit/` and this crate.

use crate::bindings::adapter::visor::plugin::types as wit;
use crate::chat::{ChatRole, FinishReason, Message, Part, ToolCall, ToolSpec, Usage};
use crate::error::{ErrorCode, GuestError};
use crate::guest::GuestState;

impl wit::Host for GuestState {}

impl From<wit::ErrorCode> for ErrorCode {
    fn from(code: wit::ErrorCode) -> Self {
        match code {
            wit::ErrorCode::InvalidRequest => Self::InvalidRequest,
            wit::ErrorCode::NotFound => Self::NotFound,
            wit::ErrorCode::Unsupported => Self::Unsupported,
            wit::ErrorCode::TooLarge => Self::TooLarge,
            wit::ErrorCode::ContextOverflow => Self::ContextOverflow,
            wit::ErrorCode::Unauthorized => Self::Unauthorized,
            wit::ErrorCode::RateLimited => Self::RateLimited,
            wit::ErrorCode::Overloaded => Self::Overloaded,
            wit::ErrorCode::Timeout => Self::Timeout,
            wit::ErrorCode::Internal => Self::Internal,
        }
    }
}

impl From<ErrorCode> for wit::ErrorCode {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidRequest => Self::InvalidRequest,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::Unsupported => Self::Unsupported,
            ErrorCode::TooLarge => Self::TooLarge,
            ErrorCode::ContextOverflow => Self::ContextOverflow,
            ErrorCode::Unauthorized => Self::Unauthorized,
            ErrorCode::RateLimited => Self::RateLimited,
            ErrorCode::Overloaded => Self::Overloaded,
            ErrorCode::Timeout => Self::Timeout,
            ErrorCode::Internal => Self::Internal,
        }
    }
}

impl From<wit::Error> for GuestError {
    fn from(error: wit::Error) -> Self {
        Self {
            code: error.code.into(),
            message: error.message,
            param: error.param,
            retry_after_s: error.retry_after,
        }
    }
}

impl From<GuestError> for wit::Error {
    fn from(error: GuestError) -> Self {
        Self {
            code: error.code.into(),
            message: error.message,
            param: error.param,
            retry_after: error.retry_after_s,
        }
    }
}

impl From<wit::Message> for Message {
    fn from(message: wit::Message) -> Self {
        let role = match message.role {
            wit::Role::System => ChatRole::System,
            wit::Role::User => ChatRole::User,
            wit::Role::Assistant => ChatRole::Assistant,
            wit::Role::Tool => ChatRole::Tool,
            wit::Role::Other(name) => ChatRole::Other(name),
        };
        Self {
            role,
            parts: message.parts.into_iter().map(Part::from).collect(),
        }
    }
}

impl From<Message> for wit::Message {
    fn from(message: Message) -> Self {
        let role = match message.role {
            ChatRole::System => wit::Role::System,
            ChatRole::User => wit::Role::User,
            ChatRole::Assistant => wit::Role::Assistant,
            ChatRole::Tool => wit::Role::Tool,
            ChatRole::Other(name) => wit::Role::Other(name),
        };
        Self {
            role,
            parts: message.parts.into_iter().map(wit::Part::from).collect(),
        }
    }
}

impl From<wit::Part> for Part {
    fn from(part: wit::Part) -> Self {
        match part {
            wit::Part::Text(text) => Self::Text(text),
            wit::Part::Image(index) => Self::Image(index),
            wit::Part::ToolCall(call) => Self::ToolCall(call.into()),
            wit::Part::ToolResult(result) => Self::ToolResult {
                id: result.id,
                content: result.content,
            },
        }
    }
}

impl From<Part> for wit::Part {
    fn from(part: Part) -> Self {
        match part {
            Part::Text(text) => Self::Text(text),
            Part::Image(index) => Self::Image(index),
            Part::ToolCall(call) => Self::ToolCall(call.into()),
            Part::ToolResult { id, content } => Self::ToolResult(wit::ToolResult { id, content }),
        }
    }
}

impl From<wit::ToolCall> for ToolCall {
    fn from(call: wit::ToolCall) -> Self {
        Self {
            id: call.id,
            name: call.name,
            arguments: call.arguments,
        }
    }
}

impl From<ToolCall> for wit::ToolCall {
    fn from(call: ToolCall) -> Self {
        Self {
            id: call.id,
            name: call.name,
            arguments: call.arguments,
        }
    }
}

impl From<wit::ToolSpec> for ToolSpec {
    fn from(tool: wit::ToolSpec) -> Self {
        Self {
            name: tool.name,
            description: tool.description,
            parameters: tool.parameters,
        }
    }
}

impl From<ToolSpec> for wit::ToolSpec {
    fn from(tool: ToolSpec) -> Self {
        Self {
            name: tool.name,
            description: tool.description,
            parameters: tool.parameters,
        }
    }
}

impl From<FinishReason> for wit::FinishReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::ToolCalls => Self::ToolCalls,
            FinishReason::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Usage> for wit::Usage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            image_tokens: usage.image_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
        }
    }
}
