//! The pictures of one generation: decoded, planned by the policy, run into crops.

use std::sync::Arc;
use std::time::Instant;

use visor_model::image::{
    Cost, Normalization, PixelValues, SourceImage, ViewPlan, image_tokens, render_view,
};
use visor_sandbox::{
    CallError, ErrorCode, Extensions, ImageContext, ModelFacts, Plugin, Source, View,
};

use super::cached::Sharing;
use super::failure::Failure;
use super::record::Stage;
use super::work::{Stop, Work};
use crate::images::budget::Room;
use crate::images::fetch::Patience;
use crate::images::{self, LoadError, Loading};
use crate::services::{HostImage, model_ops};

/// A picture and the policy's decision on it.
#[derive(Debug)]
pub(super) struct Planned {
    source: Arc<SourceImage>,
    /// The memory that takes, until the crops are made.
    _room: Room,
    plan: ViewPlan,
    /// Memory that making the crops takes beside them, in bytes.
    canvas_bytes: u64,
    /// Prompt tokens it takes.
    pub tokens: u32,
    /// Equal keys, equal crops.
    pub key: [u8; 32],
}

/// A decoded picture and the memory it takes.
pub(super) struct Decoded {
    image: Arc<SourceImage>,
    room: Room,
}

/// Fetches and decodes every picture, in order; the first that cannot be decoded ends the request.
pub(super) fn decode(
    work: &mut Work,
    sources: &[Source],
    extensions: &Extensions,
) -> Result<Vec<Decoded>, Stop> {
    count_fetches(work, sources, extensions)?;
    let config = Arc::clone(&work.call.pinned.config);
    let (mut encoded, mut headers) = (Vec::new(), Vec::new());
    for (index, source) in sources.iter().enumerate() {
        let left = config
            .images
            .named_bytes_max
            .saturating_sub(work.named_bytes);
        let bytes = images_stage(work, Some((index, extensions)), |loading| {
            images::encoded(source, loading, left)
        })?;
        if images::is_named(source) {
            work.named_bytes += bytes.len() as u64;
        }
        headers.push(images_stage(work, Some((index, extensions)), |_| {
            images::header(&bytes, &config.images)
        })?);
        encoded.push(bytes);
    }
    if encoded.is_empty() {
        return Ok(Vec::new());
    }
    let house = Arc::clone(&work.call.house);
    let mut room = images_stage(work, None, |loading| {
        images::room(&headers, &house.decoding, loading)
    })?;
    let mut decoded = Vec::with_capacity(encoded.len());
    for (index, (bytes, header)) in encoded.into_iter().zip(headers).enumerate() {
        let image = images_stage(work, Some((index, extensions)), |_| {
            images::decoded(&bytes, &config.images)
        })?;
        decoded.push(Decoded {
            image: Arc::new(image),
            room: room.split(header.decoded_bytes()),
        });
    }
    work.trace.images += u32::try_from(decoded.len()).unwrap_or(u32::MAX);
    Ok(decoded)
}

/// A part of the stage, timed; what fails is told of the picture with that index, if it is one.
fn images_stage<T>(
    work: &mut Work,
    picture: Option<(usize, &Extensions)>,
    run: impl FnOnce(&Loading<'_>) -> Result<T, LoadError>,
) -> Result<T, Stop> {
    work.check()?;
    let began = Instant::now();
    let done = run(&Loading {
        config: &work.call.pinned.config.images,
        fetcher: &work.call.house.fetcher,
        patience: Patience {
            deadline: work.deadline,
            gone: &|| work.call.cancel.is_cancelled(),
        },
        request_id: &work.call.incoming.id,
    });
    work.trace.stages.add(Stage::Images, began.elapsed());
    done.map_err(|error| match (error, picture) {
        (LoadError::Refused(error), Some((index, extensions))) => {
            Failure::from(error).at(param(index, extensions)).into()
        }
        (LoadError::Refused(error), None) => Failure::from(error).into(),
        (LoadError::Gone, _) => Stop::Gone,
    })
}

/// Counts the pictures that other servers have, before the first is asked for.
fn count_fetches(
    work: &mut Work,
    sources: &[Source],
    extensions: &Extensions,
) -> Result<(), Failure> {
    let fetches_max = work.call.pinned.config.images.fetch.per_request_max;
    let remote = sources.iter().enumerate();
    for (index, _) in remote.filter(|(_, source)| images::is_remote(source)) {
        work.fetched += 1;
        if work.fetched > fetches_max {
            let message = format!(
                "a request may have {fetches_max} images fetched (images.fetch.per_request_max)"
            );
            return Err(Failure::invalid(message).at(param(index, extensions)));
        }
    }
    Ok(())
}

/// What the client calls a picture: the adapter says it in the extension `image.<index>.param`.
fn param(index: usize, extensions: &Extensions) -> String {
    let key = format!("image.{index}.param");
    let named = extensions.iter().find(|(name, _)| *name == key);
    named.map_or_else(|| format!("images[{index}]"), |(_, value)| value.clone())
}

/// The hints for one picture: those of the request, and those addressed to it as `image.<index>.<key>`.
fn hints(index: usize, extensions: &Extensions) -> Extensions {
    let own_prefix = format!("image.{index}.");
    let own = extensions.iter().filter_map(|(key, value)| {
        Some((key.strip_prefix(&own_prefix)?.to_owned(), value.clone()))
    });
    let mut hints: Extensions = own.collect();
    for (key, value) in extensions
        .iter()
        .filter(|(key, _)| !key.starts_with("image."))
    {
        if hints.iter().all(|(own, _)| own != key) {
            hints.push((key.clone(), value.clone()));
        }
    }
    hints
}

/// Asks the image policy about every picture. The prompt has tokens for all of them: so many `left` beside the answer, and so many
/// at `most`. A picture that does not fit beside the answer at all takes of these: it is the answer that is too long then, and
/// whoever counts all of it says so.
pub(super) fn plan(
    work: &mut Work,
    sources: Vec<Decoded>,
    extensions: &Extensions,
    (mut left, mut most): (u32, u32),
) -> Result<Vec<Planned>, Stop> {
    let count = u32::try_from(sources.len()).unwrap_or(u32::MAX);
    let mut planned = Vec::with_capacity(sources.len());
    let policy = Arc::clone(&work.call.pinned.image_policy);
    let request_id = work.call.incoming.id.clone();
    let model = Arc::clone(&work.call.house.model);
    for (position, decoded) in sources.into_iter().enumerate() {
        work.check()?;
        let Decoded {
            image: source,
            room,
        } = decoded;
        let index = u32::try_from(position).unwrap_or(u32::MAX);
        let context = |tokens: u32| ImageContext {
            index,
            count,
            budget_tokens: tokens / (count - index).max(1),
            extensions: hints(position, extensions),
            model: Arc::clone(&model) as Arc<dyn ModelFacts>,
            request_id: request_id.clone(),
        };
        let began = Instant::now();
        let view = prepare(&policy, &source, (left, most), context);
        work.trace.stages.add(Stage::ImagePolicy, began.elapsed());
        let view = view.map_err(|error| {
            let failure = Failure::from(error);
            match failure.error.code {
                ErrorCode::Internal | ErrorCode::Timeout => failure,
                _ => failure.at(param(position, extensions)),
            }
        })?;
        let plan = view_plan(&view);
        let work_mpx_max = work.call.pinned.config.sandbox.image_work_mpx_max;
        let cost = check_work(&source, &plan, work_mpx_max)
            .map_err(|why| Failure::nonsense(policy.id(), &why))?;
        let tokens = image_tokens(plan.columns, plan.rows);
        left = left.saturating_sub(tokens);
        most = most.saturating_sub(tokens);
        let key = plan.key(&source.digest);
        planned.push(Planned {
            source,
            _room: room,
            plan,
            canvas_bytes: cost.held_bytes(),
            tokens,
            key,
        });
    }
    Ok(planned)
}

/// The view of a picture beside the answer, or else the one that the prompt alone has room for.
fn prepare(
    policy: &Plugin,
    source: &Arc<SourceImage>,
    (left, most): (u32, u32),
    context: impl Fn(u32) -> ImageContext,
) -> Result<View, CallError> {
    let within =
        |tokens: u32| policy.prepare(Arc::new(HostImage(Arc::clone(source))), context(tokens));
    match within(left) {
        Err(CallError::Refused(error))
            if error.code == ErrorCode::ContextOverflow && left < most =>
        {
            within(most)
        }
        view => view,
    }
}

/// What a view costs, before any of it is run; one that would take the host too long is refused.
fn check_work(source: &SourceImage, plan: &ViewPlan, work_mpx_max: u64) -> Result<Cost, String> {
    let cost = plan
        .cost((source.width_px(), source.height_px()))
        .map_err(|error| error.to_string())?;
    if cost.reads_px <= work_mpx_max.saturating_mul(1_000_000) {
        return Ok(cost);
    }
    Err(format!(
        "a view that reads {} pixels; {work_mpx_max} million are allowed (sandbox.image_work_mpx_max)",
        cost.reads_px
    ))
}

fn view_plan(view: &View) -> ViewPlan {
    let normalization = view.normalization.map(|own| Normalization {
        mean: own.mean,
        deviation: own.deviation,
    });
    ViewPlan {
        overview: view.overview.as_deref().map(model_ops),
        columns: view.columns,
        rows: view.rows,
        tiles: view.tiles.iter().map(|tile| model_ops(tile)).collect(),
        normalization: normalization.unwrap_or_default(),
    }
}

/// Crops of a request's pictures, and the memory they take; none without pictures.
pub(super) struct Rendered {
    pub pixels: Vec<Arc<PixelValues>>,
    pub room: Option<Room>,
}

/// Runs the plans into crops, or takes them from the cache.
pub(super) fn render(
    work: &mut Work,
    planned: Vec<Planned>,
    sharing: &Sharing,
) -> Result<Rendered, Stop> {
    let house = Arc::clone(&work.call.house);
    let bytes = planned.iter().map(|image| image.plan.crops_bytes()).sum();
    let room = (bytes > 0).then(|| {
        images_stage(work, None, |loading| {
            images::crops_room(bytes, &house.crops, loading)
        })
    });
    let room = room.transpose()?;
    let access = sharing.scoping.pixels;
    let mut rendered = Vec::with_capacity(planned.len());
    for image in planned {
        work.check()?;
        let key = sharing.key(image.key);
        let found = access.read.then(|| house.pixels.get(&key)).flatten();
        if let Some(pixels) = found {
            rendered.push(pixels);
            continue;
        }
        let _canvases = images_stage(work, None, |loading| {
            images::canvases_room(image.canvas_bytes, &house.canvases, loading)
        })?;
        let began = Instant::now();
        let pixels = render_view(&image.source, &image.plan).map_err(|error| {
            // The sandbox checked sizes as they were recorded, so this is a view no model takes.
            Failure::nonsense(work.call.pinned.image_policy.id(), &error.to_string())
        })?;
        let elapsed = began.elapsed();
        work.trace.stages.add(Stage::Preprocess, elapsed);
        let pixels = Arc::new(pixels);
        if access.write {
            let entry = sharing.entry(pixels.bytes(), elapsed, image.tokens);
            house.pixels.insert(key, Arc::clone(&pixels), &entry);
        }
        rendered.push(pixels);
    }
    Ok(Rendered {
        pixels: rendered,
        room,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Extensions {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_picture_gets_its_own_hints_before_the_requests() {
        let extensions = pairs(&[
            ("detail", "auto"),
            ("image.0.detail", "low"),
            ("image.1.param", "messages[0].content[2].image_url"),
            ("user", "u"),
        ]);
        assert_eq!(
            hints(0, &extensions),
            pairs(&[("detail", "low"), ("user", "u")])
        );
        assert_eq!(
            hints(2, &extensions),
            pairs(&[("detail", "auto"), ("user", "u")])
        );
        assert_eq!(param(1, &extensions), "messages[0].content[2].image_url");
        assert_eq!(param(0, &extensions), "images[0]");
    }

    #[test]
    fn a_view_that_would_take_minutes_is_refused_before_it_is_run() {
        use visor_model::image::{Filter, ImageLimits, Op, decode, hd_plan};
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cli/bench.png");
        let source = decode(&std::fs::read(path).unwrap(), &ImageLimits::default(), true).unwrap();
        let (width, height) = (source.width_px(), source.height_px());
        let mut plan = hd_plan(width, height, 16).unwrap();
        let work_mpx_max = crate::config::Config::default().sandbox.image_work_mpx_max;
        assert!(check_work(&source, &plan, work_mpx_max).is_ok());
        let resize = |side| Op::Resize {
            width: side,
            height: side,
            filter: Filter::Nearest,
        };
        let blurs = vec![Op::blur(64.0); 30];
        plan.overview = Some([vec![resize(8192)], blurs, vec![resize(336)]].concat());
        let refused = check_work(&source, &plan, work_mpx_max).unwrap_err();
        assert!(refused.contains("2000 million are allowed"), "{refused}");
    }

    /// The shipped policy against the reference's transform, which the goldens hold: equal keys are
    /// equal operations on equal pixels.
    #[test]
    fn the_shipped_policy_records_the_reference_transform() {
        let options = crate::wiring::HouseOptions {
            source: None,
            cache_folder: None,
            progress: Box::new(|_| {}),
        };
        let config = crate::config::Config::default();
        let house = crate::wiring::House::open(config, options).expect("the defaults open");
        let pinned = house
            .pin("/v1/chat/completions")
            .expect("the default route");
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/images");
        let mut compared = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let limits = visor_model::image::ImageLimits::default();
            let source = visor_model::image::decode(&bytes, &limits, true).unwrap();
            let source = Arc::new(source);
            for crops in [1, 4, 16] {
                let context = ImageContext {
                    index: 0,
                    count: 1,
                    budget_tokens: 4096,
                    extensions: pairs(&[("num_crops", &crops.to_string())]),
                    model: Arc::clone(&house.model) as Arc<dyn ModelFacts>,
                    request_id: "test".to_owned(),
                };
                let image = Arc::new(HostImage(Arc::clone(&source)));
                let view = pinned.image_policy.prepare(image, context).unwrap();
                let (width, height) = (source.width_px(), source.height_px());
                let want = visor_model::image::hd_plan(width, height, crops).unwrap();
                let have = view_plan(&view);
                assert_eq!(have.key(&source.digest), want.key(&source.digest));
                compared += 1;
            }
        }
        assert_eq!(compared, 27);
    }
}
