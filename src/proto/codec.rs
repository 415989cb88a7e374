//! How messages become bytes and back.

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// The codec of the generated services, whose buffers begin small.
///
/// Each side of a stream keeps two of them for as long as it lives. Thousands of sidecars are connected at once, and most
/// of what they say and hear is far smaller than the 8 KiB of tonic's own: buffers grow where a message is larger.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SmallBuffers<T, U>(std::marker::PhantomData<(T, U)>);

/// An answer to a beat about ten keyrings, or three versions of a key.
const BUFFER: usize = 512;
/// tonic's own: how much of what is ready is gathered before it is handed on.
const GATHERED: usize = 32 << 10;

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER, GATHERED))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER, GATHERED))
    }
}
