//! Imports `template-input`, `image-policy-input` and `cache-strategy-input`: what a call is about.

use wasmtime::component::Resource;

use crate::bindings::adapter::visor::plugin::types as wit;
use crate::bindings::cache_strategy::visor::plugin::cache_strategy_input;
use crate::bindings::image_policy::visor::plugin::image_policy_input;
use crate::bindings::template::visor::plugin::template_input;
use crate::chat::Extensions;
use crate::error::FaultKind;
use crate::guest::{GuestState, HostFault};
use crate::image_policy::ImageContext;
use crate::strategy::Lookup;
use crate::template::Conversation;

impl GuestState {
    fn conversation(&self, handle: &Resource<Conversation>) -> wasmtime::Result<&Conversation> {
        self.on_time()?;
        Ok(self.table.get(handle)?)
    }

    fn context(&self, handle: &Resource<ImageContext>) -> wasmtime::Result<&ImageContext> {
        self.on_time()?;
        Ok(self.table.get(handle)?)
    }

    fn lookup(&self, handle: &Resource<Lookup>) -> wasmtime::Result<&Lookup> {
        self.on_time()?;
        Ok(self.table.get(handle)?)
    }
}

impl template_input::Host for GuestState {}

impl template_input::HostConversation for GuestState {
    fn messages(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<Vec<wit::Message>> {
        let messages = &self.conversation(&handle)?.messages;
        Ok(messages.iter().cloned().map(wit::Message::from).collect())
    }

    fn tools(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<Vec<wit::ToolSpec>> {
        let tools = &self.conversation(&handle)?.tools;
        Ok(tools.iter().cloned().map(wit::ToolSpec::from).collect())
    }

    fn image_count(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<u32> {
        let count = self.conversation(&handle)?.image_tokens.len();
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    fn image_tokens(
        &mut self,
        handle: Resource<Conversation>,
        index: u32,
    ) -> wasmtime::Result<u32> {
        let image_tokens = &self.conversation(&handle)?.image_tokens;
        image_tokens.get(index as usize).copied().ok_or_else(|| {
            let message = format!(
                "asks for image {index}; the conversation has {}",
                image_tokens.len()
            );
            HostFault::new(FaultKind::Contract, message).into()
        })
    }

    fn budget(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<u32> {
        Ok(self.conversation(&handle)?.budget_tokens)
    }

    fn open_turn(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<bool> {
        Ok(self.conversation(&handle)?.open_turn)
    }

    fn extensions(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<Extensions> {
        Ok(self.conversation(&handle)?.extensions.clone())
    }

    fn drop(&mut self, handle: Resource<Conversation>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl image_policy_input::Host for GuestState {}

impl image_policy_input::HostContext for GuestState {
    fn index(&mut self, handle: Resource<ImageContext>) -> wasmtime::Result<u32> {
        Ok(self.context(&handle)?.index)
    }

    fn count(&mut self, handle: Resource<ImageContext>) -> wasmtime::Result<u32> {
        Ok(self.context(&handle)?.count)
    }

    fn budget(&mut self, handle: Resource<ImageContext>) -> wasmtime::Result<u32> {
        Ok(self.context(&handle)?.budget_tokens)
    }

    fn extensions(&mut self, handle: Resource<ImageContext>) -> wasmtime::Result<Extensions> {
        Ok(self.context(&handle)?.extensions.clone())
    }

    fn drop(&mut self, handle: Resource<ImageContext>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl cache_strategy_input::Host for GuestState {}

impl cache_strategy_input::HostLookup for GuestState {
    fn principal(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<Option<String>> {
        Ok(self.lookup(&handle)?.principal.clone())
    }

    fn model(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<String> {
        Ok(self.lookup(&handle)?.model.clone())
    }

    fn route(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<String> {
        Ok(self.lookup(&handle)?.route.clone())
    }

    fn prompt_tokens(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<u32> {
        Ok(self.lookup(&handle)?.prompt_tokens)
    }

    fn image_count(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<u32> {
        Ok(self.lookup(&handle)?.image_count)
    }

    fn temperature(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<f32> {
        Ok(self.lookup(&handle)?.temperature)
    }

    fn extensions(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<Extensions> {
        Ok(self.lookup(&handle)?.extensions.clone())
    }

    fn drop(&mut self, handle: Resource<Lookup>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}
