//! TLS for the listener: a certificate chain and its key, read once at start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config;

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read, or has not in it what it should.
    #[error("{key} = {}: {source}", file.display())]
    File {
        /// Which key names it.
        key: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The certificate and the key do not belong together, or are of a kind nobody accepts.
    #[error("server.tls_cert_file and server.tls_key_file cannot be used: {0}")]
    Pair(#[from] tokio_rustls::rustls::Error),
}

impl TlsError {
    /// The configuration key that is to blame.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::File { key, .. } => key,
            Self::Pair(_) => "server.tls_key_file",
        }
    }
}

/// What turns connections into sealed ones; none when no certificate is configured.
///
/// # Errors
/// Which file is at fault, and why.
pub fn acceptor(config: &config::ServerConfig) -> Result<Option<TlsAcceptor>, TlsError> {
    if config.tls_cert_file.as_os_str().is_empty() {
        return Ok(None);
    }
    let chain = certificates(&config.tls_cert_file)?;
    let key = PrivateKeyDer::from_pem_file(&config.tls_key_file)
        .map_err(|source| unreadable("server.tls_key_file", &config.tls_key_file, source))?;
    let mut tls = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(tls))))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |source| unreadable("server.tls_cert_file", file, source);
    let chain: Vec<_> = CertificateDer::pem_file_iter(file)
        .map_err(unusable)?
        .collect::<Result<_, _>>()
        .map_err(unusable)?;
    if chain.is_empty() {
        return Err(unusable(pem::Error::NoItemsFound));
    }
    Ok(chain)
}

fn unreadable(key: &'static str, file: &Path, source: pem::Error) -> TlsError {
    TlsError::File {
        key,
        file: file.to_owned(),
        source,
    }
}
