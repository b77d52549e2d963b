//! What a client is told of a fetch, which must not depend on what this server can see of its network.

use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use visor_sandbox::{ErrorCode, GuestError, Source};

use super::tests::{
    LOOPBACK, Pictures, fetch, naming, ok, open, redirect, tls_pictures, trusting_port,
};
use super::*;
use crate::config::ImagesConfig;
use crate::images::{LoadError, Loading, encoded};

/// What the client is told of a picture that is not to be had.
fn told(fetcher: &Fetcher, images: &ImagesConfig, url: &str) -> GuestError {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let loading = Loading {
        config: images,
        fetcher,
        patience: Patience {
            deadline: Instant::now() + Duration::from_secs(60),
            gone: &|| false,
        },
        request_id: "test",
    };
    match encoded(&Source::Url(url.to_owned()), &loading, images.bytes_max) {
        Err(LoadError::Refused(error)) => error,
        other => panic!("{url}: {other:?}"),
    }
}

#[test]
fn whatever_keeps_a_server_from_being_reached_sounds_the_same() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let pictures = Pictures::answering(&[b"SSH-2.0-OpenSSH_9.6\r\n"]);
    let (tls_port, _, serving) = tls_pictures(Vec::new());
    let unknown = Fetcher {
        names: Names::new(1, |_| Err(io::Error::other("NXDOMAIN"))),
        ..naming(&[])
    };
    let private = naming(&["10.0.0.1".parse().unwrap()]);
    let mut hasty = open(&[silent_port]);
    hasty.fetch.timeout_s = 1;
    let cases = [
        (unknown, open(&[port]), "http", port),
        (naming(&[]), open(&[port]), "http", port),
        (naming(&[LOOPBACK]), open(&[port]), "http", port),
        (private, open(&[port]), "https", port),
        (trusting_port(port), open(&[port]), "http", port),
        (trusting_port(silent_port), hasty, "http", silent_port),
        (
            trusting_port(pictures.port),
            open(&[pictures.port]),
            "http",
            pictures.port,
        ),
        (
            trusting_port(tls_port),
            open(&[tls_port]),
            "https",
            tls_port,
        ),
    ];
    for (fetcher, images, scheme, port) in cases {
        let url = format!("{scheme}://x.example:{port}/");
        let error = told(&fetcher, &images, &url);
        assert_eq!(error.code, ErrorCode::Unsupported, "{url}");
        assert_eq!(
            error.message,
            "the image could not be fetched from \"x.example\"; send the image itself as \
             data:image/jpeg;base64,...",
            "{url}"
        );
    }
    pictures.requests();
    serving.join().unwrap();
}

#[test]
fn what_a_redirect_leads_to_is_not_told_either() {
    let inside = redirect("http://inside.example/");
    let pictures = Pictures::answering(&[&inside]);
    let port = pictures.port;
    let url = format!("http://x.example:{port}/");
    let error = told(&trusting_port(port), &open(&[port, 80]), &url);
    assert!(
        error
            .message
            .contains("could not be fetched from \"inside.example\""),
        "{error}"
    );
    pictures.requests();
}

#[test]
fn an_operators_networks_are_refused_as_if_nobody_were_there() {
    let public: IpAddr = "93.184.216.34".parse().unwrap();
    let public6: IpAddr = "2606:4700::1111".parse().unwrap();
    for (network, addresses) in [
        ("93.184.216.34/32", &[public][..]),
        ("93.184.0.0/16", &[public]),
        ("2606:4700::/32", &[public6]),
        ("0.0.0.0/0", &[public6, public]),
    ] {
        let mut images = open(&[80]);
        images.fetch.refused_networks = vec![network.parse().unwrap()];
        let url = "http://x.example/";
        match fetch(&naming(addresses), url, &images) {
            Err(FetchError::Unreached { why, .. }) => {
                assert!(why.contains("images.fetch.refused_networks"), "{why}");
            }
            other => panic!("{network}: {other:?}"),
        }
        let error = told(&naming(addresses), &images, url);
        assert!(error.message.starts_with("the image could not be fetched"));
    }
}

#[test]
fn so_many_are_fetched_at_once_and_who_waits_in_vain_is_told_to_come_back() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let mut images = open(&[port]);
    images.fetch.timeout_s = 1;
    let fetcher = Fetcher {
        places: Semaphore::new(1),
        ..trusting_port(port)
    };
    let url = format!("http://x.example:{port}/");
    let place = fetcher.places.try_acquire().unwrap();
    let error = told(&fetcher, &images, &url);
    assert_eq!(error.code, ErrorCode::Overloaded, "{error}");
    assert!(error.retry_after_s.is_some(), "{error}");
    drop(place);
    let error = told(&fetcher, &images, &url);
    assert_eq!(error.code, ErrorCode::Unsupported, "{error}");
    assert_eq!(fetcher.places.available_permits(), 1, "given back");
}

#[test]
fn certificates_that_come_later_are_found() {
    let (port, trusted, serving) = tls_pictures(ok("sealed"));
    let roots = trusted.trust.get().cloned().unwrap();
    let looks = AtomicUsize::new(0);
    let fetcher = Fetcher {
        load_trust: Box::new(move || match looks.fetch_add(1, SeqCst) {
            0 => Err("no certificates yet".to_owned()),
            1 => Ok(Arc::clone(&roots)),
            _ => panic!("what was found is kept"),
        }),
        ..trusting_port(port)
    };
    assert_eq!(fetcher.trust().unwrap_err(), "no certificates yet");
    let url = format!("https://pictures.example:{port}/");
    assert_eq!(fetch(&fetcher, &url, &open(&[port])).unwrap(), "sealed");
    assert!(fetcher.trust().is_ok());
    serving.join().unwrap();
}
