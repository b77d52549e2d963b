//! Import `adapter-input`: the HTTP request, getter by getter.

use wasmtime::component::Resource;

use crate::adapter::types::{Blob, FormPart, HttpRequest};
use crate::bindings::adapter::visor::plugin::adapter_input as wit;
use crate::bindings::adapter::visor::plugin::types::Error;
use crate::guest::GuestState;

/// `adapter-input.request`: the request, and which of its blobs are taken.
#[expect(unreachable_pub, reason = "bindgen re-exports it")]
pub struct RequestHandle {
    request: HttpRequest,
    blobs: Vec<Option<Blob>>,
}

impl RequestHandle {
    pub(crate) fn new(mut request: HttpRequest) -> Self {
        let blobs = std::mem::take(&mut request.blobs)
            .into_iter()
            .map(Some)
            .collect();
        Self { request, blobs }
    }
}

impl GuestState {
    fn request(&self, handle: &Resource<RequestHandle>) -> wasmtime::Result<&HttpRequest> {
        self.on_time()?;
        Ok(&self.table.get(handle)?.request)
    }
}

fn find(pairs: &[(String, String)], name: &str) -> Option<String> {
    pairs
        .iter()
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.clone())
}

impl wit::Host for GuestState {}

impl wit::HostRequest for GuestState {
    fn method(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<String> {
        Ok(self.request(&handle)?.method.clone())
    }

    fn path(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<String> {
        Ok(self.request(&handle)?.path.clone())
    }

    fn path_param(
        &mut self,
        handle: Resource<RequestHandle>,
        name: String,
    ) -> wasmtime::Result<Option<String>> {
        Ok(find(&self.request(&handle)?.path_params, &name))
    }

    fn query(
        &mut self,
        handle: Resource<RequestHandle>,
        name: String,
    ) -> wasmtime::Result<Option<String>> {
        Ok(find(&self.request(&handle)?.query, &name))
    }

    fn header(
        &mut self,
        handle: Resource<RequestHandle>,
        name: String,
    ) -> wasmtime::Result<Option<String>> {
        Ok(find(
            &self.request(&handle)?.headers,
            &name.to_ascii_lowercase(),
        ))
    }

    fn principal(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<Option<String>> {
        Ok(self.request(&handle)?.principal.clone())
    }

    fn id(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<String> {
        Ok(self.request(&handle)?.id.clone())
    }

    fn text(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<Result<String, Error>> {
        Ok(self.request(&handle)?.text.clone().map_err(Error::from))
    }

    fn marker(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<String> {
        Ok(self.request(&handle)?.lifted.marker().to_owned())
    }

    fn blob(
        &mut self,
        handle: Resource<RequestHandle>,
        index: u32,
    ) -> wasmtime::Result<Option<Resource<Blob>>> {
        self.on_time()?;
        let taken = self.table.get_mut(&handle)?.blobs.get_mut(index as usize);
        let taken = taken.and_then(Option::take);
        taken.map(|blob| Ok(self.table.push(blob)?)).transpose()
    }

    fn raw(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<Resource<Blob>> {
        let raw = self.request(&handle)?.raw.clone();
        Ok(self.table.push(raw)?)
    }

    fn form(
        &mut self,
        handle: Resource<RequestHandle>,
    ) -> wasmtime::Result<Vec<Resource<FormPart>>> {
        let parts = self.request(&handle)?.form.clone();
        parts
            .into_iter()
            .map(|part| Ok(self.table.push(part)?))
            .collect()
    }

    fn drop(&mut self, handle: Resource<RequestHandle>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl wit::HostFormPart for GuestState {
    fn name(&mut self, handle: Resource<FormPart>) -> wasmtime::Result<String> {
        self.on_time()?;
        Ok(self.table.get(&handle)?.name.clone())
    }

    fn filename(&mut self, handle: Resource<FormPart>) -> wasmtime::Result<Option<String>> {
        self.on_time()?;
        Ok(self.table.get(&handle)?.filename.clone())
    }

    fn content(&mut self, handle: Resource<FormPart>) -> wasmtime::Result<Resource<Blob>> {
        self.on_time()?;
        let content = self.table.get(&handle)?.content.clone();
        Ok(self.table.push(content)?)
    }

    fn drop(&mut self, handle: Resource<FormPart>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}
