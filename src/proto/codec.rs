//! The codec of the generated services.

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// A codec whose buffers begin small.
///
/// Each end of a stream has two buffers for the whole life of the stream. Thousands of sidecars are connected at the same
/// time, and most of their messages are far smaller than the 8 KiB of the codec of tonic. Buffers grow for larger messages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SmallBuffers<T, U>(std::marker::PhantomData<(T, U)>);

/// The initial size of a buffer, in bytes: an answer to a beat about ten keyrings, or three versions of a key.
const BUFFER: usize = 512;
/// The default of tonic, in bytes: how much ready data is collected before it is passed on.
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
